// What a RoI operator is told besides maps and boxes, and the checks of its tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "tensors.h"

namespace hkd {

struct RoiOptions {
  std::vector<double> strides;
  int64_t rows, columns, sampling_ratio;

  int64_t bins() const {
    return rows * columns;
  }
};

inline void check_bins(const RoiOptions& options) {
  STD_TORCH_CHECK(options.rows > 0 && options.columns > 0, "Give at least one bin.");
}

// Shapes are refused here once more, since whoever calls the operator itself has no other guard.
inline void check_pyramid(
    const std::vector<torch::stable::Tensor>& features,
    const std::vector<torch::stable::Tensor>& boxes,
    const RoiOptions& options) {
  STD_TORCH_CHECK(
      !features.empty() && features.size() == options.strides.size(), "Give one stride a level.");
  check_bins(options);
  for (const auto& map : features) {
    STD_TORCH_CHECK(
        same_device(map, features[0]) && map.dim() == 4 &&
            map.size(0) == static_cast<int64_t>(boxes.size()) &&
            map.size(1) == features[0].size(1) && map.scalar_type() == features[0].scalar_type(),
        "Every level must be (N, C, H, W) on one device, with as many images as lists of boxes, "
        "and of one width and dtype.");
  }
}

} // namespace hkd
