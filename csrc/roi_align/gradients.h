// Arguments of the RoI operators as tensors: what is checked, and the gradients that are allocated.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "dispatch.h"
#include "feature_maps.h"
#include "roi_align/pooling.h"
#include "streaming.h"

namespace hkd {

// Shapes are refused here once more, since whoever calls the operator itself has no other guard.
inline void check_pyramid(
    const std::vector<torch::stable::Tensor>& features,
    const std::vector<torch::stable::Tensor>& boxes,
    const RoiOptions& options) {
  STD_TORCH_CHECK(
      !features.empty() && features.size() == options.strides.size(), "Give one stride a level.");
  STD_TORCH_CHECK(options.rows > 0 && options.columns > 0, "Give at least one bin.");
  for (const auto& map : features) {
    STD_TORCH_CHECK(
        map.is_cpu() && map.dim() == 4 && map.size(0) == static_cast<int64_t>(boxes.size()) &&
            map.size(1) == features[0].size(1) && map.scalar_type() == features[0].scalar_type(),
        "Every level must be (N, C, H, W) on the CPU, with as many images as lists of boxes, and "
        "of one width and dtype.");
  }
}

// The views of tensors that `as_stored` has returned.
inline std::vector<StoredMap> stored_maps(const std::vector<torch::stable::Tensor>& stored) {
  std::vector<StoredMap> maps;
  for (const auto& map : stored) {
    maps.push_back(
        {{map.const_data_ptr(),
          map.size(0),
          map.size(1),
          map.size(2),
          map.size(3),
          !map.is_contiguous()},
         map.scalar_type()});
  }
  return maps;
}

inline std::vector<MapShape> map_shapes(const std::vector<StoredMap>& maps) {
  std::vector<MapShape> shapes;
  for (const auto& stored : maps) {
    const auto& map = stored.map;
    shapes.push_back({map.images, map.channels, map.height, map.width, map.channels_last});
  }
  return shapes;
}

// Gradients of a pyramid: zeros, or a copy of what is already there, to which a kernel adds.
// Float and double are added in place; half precision in float, and rounded once at the end.
class [[gnu::visibility("hidden")]] Gradients {
 public:
  Gradients(
      const torch::stable::Tensor& like,
      const std::vector<MapShape>& shapes,
      const std::vector<torch::stable::Tensor>& incoming)
      : shapes_(shapes), type_(like.scalar_type()), device_(like.device()) {
    STD_TORCH_CHECK(
        incoming.empty() || incoming.size() == shapes.size(),
        "incoming must be empty or hold one gradient a level.");
    for (std::size_t level = 0; level < shapes.size(); ++level) {
      sums_.push_back(empty(shapes[level], accumulate_type(type_)));
      if (incoming.empty()) {
        zero_fill(sums_[level]);
      } else {
        STD_TORCH_CHECK(
            incoming[level].is_cpu() && incoming[level].numel() == sums_[level].numel(),
            "incoming must have the shapes of the maps and be on the CPU.");
        torch::stable::copy_(sums_[level], incoming[level]);
      }
    }
  }

  template <typename Acc>
  std::vector<FeatureMap<Acc>> maps() const {
    std::vector<FeatureMap<Acc>> maps;
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      const MapShape& s = shapes_[i];
      maps.push_back(
          {sums_[i].template mutable_data_ptr<Acc>(),
           s.images,
           s.channels,
           s.height,
           s.width,
           s.channels_last});
    }
    return maps;
  }

  // The gradients in the dtype of the maps.
  std::vector<torch::stable::Tensor> finish() {
    if (type_ == accumulate_type(type_)) {
      return std::move(sums_);
    }
    std::vector<torch::stable::Tensor> rounded;
    for (std::size_t level = 0; level < shapes_.size(); ++level) {
      rounded.push_back(empty(shapes_[level], type_));
      torch::stable::copy_(rounded[level], sums_[level]);
    }
    return rounded;
  }

 private:
  torch::stable::Tensor empty(const MapShape& s, ScalarType type) const {
    return torch::stable::empty(
        {s.images, s.channels, s.height, s.width},
        type,
        std::nullopt,
        device_,
        std::nullopt,
        s.channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                        : torch::headeronly::MemoryFormat::Contiguous);
  }

  std::vector<MapShape> shapes_;
  ScalarType type_;
  torch::stable::Device device_;
  std::vector<torch::stable::Tensor> sums_;
};

} // namespace hkd
