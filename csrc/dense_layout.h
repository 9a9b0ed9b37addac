// Tensors whose elements a kernel can go through as they lie in memory, whatever their order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace hkd {

// Whether the elements lie in memory without gaps or overlaps, in the order of some permutation of
// the axes.
inline bool is_dense(const torch::stable::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> axes; // (stride, length)
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (tensor.size(axis) != 1) {
      axes.emplace_back(tensor.stride(axis), tensor.size(axis));
    }
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, length] : axes) {
    if (stride != expected) {
      return false;
    }
    expected *= length;
  }
  return true;
}

// Whether equal indices lie at equal places.
inline bool lie_alike(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    if (a.size(axis) != 1 && a.stride(axis) != b.stride(axis)) {
      return false;
    }
  }
  return true;
}

} // namespace hkd
