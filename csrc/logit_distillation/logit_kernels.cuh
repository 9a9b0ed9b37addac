// What the kernels of this folder share on the device.
#pragma once

#include "finish_loss.cuh"
#include "hkd/reduce.cuh"
#include "hkd/storage.cuh"
#include "logit_distillation/logit_kernels.h"

namespace hkd {

constexpr int kThreads = 256;

// Blocks that a multiprocessor is to run at once: the registers that a thread gets without
// spilling.
template <typename Acc>
constexpr int kBlocksAtOnce = sizeof(Acc) == sizeof(double) ? 2 : 4;

template <typename Acc>
__device__ __forceinline__ Acc load(const GradientScale& scale) {
  return static_cast<Acc>(scale.factor) * *static_cast<const Acc*>(scale.grad) /
         at_least_one(load<Acc>(scale.denominator));
}

// The items [begin, end) of one tensor that the calling block takes.
struct Stretch {
  const LogitTensor* tensor;
  int64_t begin, end;

  __device__ explicit Stretch(const LogitTensors& list) {
    const int64_t per_block = list.items_per_block;
    const int32_t block = blockIdx.x;
    int t = list.count - 1;
    while (block < list.tensors[t].first_block) {
      --t;
    }
    tensor = &list.tensors[t];
    begin = (block - tensor->first_block) * per_block;
    end = begin + per_block < tensor->items ? begin + per_block : tensor->items;
  }
};

// Adds the numbers of the threads up, and leaves them as the pair of this block, or finishes.
template <typename Acc>
__device__ __forceinline__ void leave_pair(
    Acc first, Acc second, const LossSums& loss, int64_t blocks_before = 0) {
  Acc sums[2] = {first, second};
  block_sums<kThreads>(sums);
  if (threadIdx.x == 0 && loss.by_one_block()) {
    finish<Acc>(loss, sums[0], sums[1]);
  } else if (threadIdx.x == 0) {
    Acc* pair = static_cast<Acc*>(loss.pairs) + 2 * (blocks_before + int64_t(blockIdx.x));
    pair[0] = sums[0];
    pair[1] = sums[1];
  }
}

// Neighbouring lanes that share a row: the largest power of two that the row fills, at most a warp.
inline int lanes_of_row(int64_t length) {
  int lanes = 1;
  while (lanes < 32 && 2 * lanes <= length) {
    lanes *= 2;
  }
  return lanes;
}

// Calls body with a bool as a constant.
template <typename Body>
void with_constant(bool value, const Body& body) {
  value ? body(std::true_type{}) : body(std::false_type{});
}

} // namespace hkd
