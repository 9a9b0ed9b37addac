// From tensors to feature maps: the layouts that kernels read natively, and gradients of the same.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "dispatch.h"
#include "hkd/feature_map.h"

namespace hkd {

// Whether the elements of a 4-d tensor lie as NHWC without gaps. Strides of axes of length 1 do not
// matter.
inline bool is_channels_last(const torch::stable::Tensor& map) {
  const int64_t order[] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (const int64_t axis : order) {
    if (map.size(axis) != 1 && map.stride(axis) != expected) {
      return false;
    }
    expected *= map.size(axis);
  }
  return true;
}

// The tensor itself where a kernel can read it as stored, a contiguous (NCHW) copy elsewhere.
inline torch::stable::Tensor as_stored(const torch::stable::Tensor& map) {
  return map.is_contiguous() || is_channels_last(map) ? map : torch::stable::contiguous(map);
}

// The view of a tensor that `as_stored` has returned. A tensor that is both NCHW and NHWC (one
// channel, or one pixel) is NCHW.
template <typename T>
FeatureMap<const T> const_feature_map(const torch::stable::Tensor& map) {
  return {
      map.const_data_ptr<T>(),
      map.size(0),
      map.size(1),
      map.size(2),
      map.size(3),
      !map.is_contiguous()};
}

template <typename T>
FeatureMap<T> mutable_feature_map(const torch::stable::Tensor& map) {
  return {
      map.mutable_data_ptr<T>(),
      map.size(0),
      map.size(1),
      map.size(2),
      map.size(3),
      !map.is_contiguous()};
}

inline std::vector<torch::stable::Tensor> as_stored(
    const std::vector<torch::stable::Tensor>& maps) {
  std::vector<torch::stable::Tensor> stored;
  for (const auto& map : maps) {
    stored.push_back(as_stored(map));
  }
  return stored;
}

} // namespace hkd
