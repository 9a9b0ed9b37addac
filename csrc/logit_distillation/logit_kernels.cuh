// What the kernels of this folder share on the device.
#pragma once

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
__device__ __forceinline__ Acc load(const DeviceNumber& number) {
  if (number.floating.data != nullptr) {
    return load<Acc>(number.floating, 0);
  }
  return number.integer != nullptr ? static_cast<Acc>(*number.integer)
                                   : static_cast<Acc>(number.value);
}

// max(x, 1), but NaN stays.
template <typename Acc>
__device__ __forceinline__ Acc at_least_one(Acc x) {
  return x < 1 ? Acc(1) : x;
}

template <typename Acc>
__device__ __forceinline__ Acc load(const GradientScale& scale) {
  return static_cast<Acc>(scale.factor) * *static_cast<const Acc*>(scale.grad) /
         at_least_one(load<Acc>(scale.denominator));
}

// The items [begin, end) of one tensor that the calling block takes.
struct Stretch {
  const LogitTensor* tensor;
  int64_t begin, end;

  __device__ Stretch(const LogitTensors& list, int64_t per_block) {
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

template <typename Acc>
__device__ __forceinline__ void leave_pair(Acc first, Acc second, Acc* pairs) {
  Acc sums[2] = {first, second};
  block_sums<kThreads>(sums);
  if (threadIdx.x == 0) {
    pairs[2 * int64_t(blockIdx.x)] = sums[0];
    pairs[2 * int64_t(blockIdx.x) + 1] = sums[1];
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

// Calls body(Acc{}).
template <typename Body>
void dispatch_loss_type(bool is_double, const Body& body) {
  is_double ? body(double{}) : body(float{});
}

// Calls body with a bool as a constant.
template <typename Body>
void with_constant(bool value, const Body& body) {
  value ? body(std::true_type{}) : body(std::false_type{});
}

} // namespace hkd
