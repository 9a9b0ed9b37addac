// How a block finishes a loss.
#pragma once

#include "finish_loss.h"
#include "hkd/storage.cuh"

namespace hkd {

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

// By one thread, from the sums over all blocks.
template <typename Acc>
__device__ __forceinline__ void finish(const LossSums& sums, double first, double second) {
  const double denominator =
      at_least_one(sums.divide_by_second ? second : load<double>(sums.denominator));
  if (sums.loss != nullptr) {
    *static_cast<Acc*>(sums.loss) = static_cast<Acc>(sums.scale * first / denominator);
  }
  if (sums.used_denominator != nullptr) {
    *static_cast<Acc*>(sums.used_denominator) = static_cast<Acc>(denominator);
  }
}

// Calls body(Acc{}).
template <typename Body>
void dispatch_loss_type(bool is_double, const Body& body) {
  is_double ? body(double{}) : body(float{});
}

} // namespace hkd
