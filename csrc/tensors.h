// Device and shape predicates.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace hkd {

inline bool same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.get_device_index() == b.get_device_index() && a.is_cpu() == b.is_cpu();
}

inline bool same_shape(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t axis = 0; same && axis < a.dim(); ++axis) {
    same = a.size(axis) == b.size(axis);
  }
  return same;
}

} // namespace hkd
