// Maps of the RoI operators as the CPU kernels take them, and the gradients that are allocated.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "dispatch.h"
#include "feature_maps.h"
#include "roi_align/pooling.h"
#include "streaming.h"

namespace hkd {

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

// Gradients of a pyramid: zeros to which a kernel adds. Float and double are added in place; half
// precision in float, and rounded once at the end.
class [[gnu::visibility("hidden")]] Gradients {
 public:
  Gradients(const torch::stable::Tensor& like, const std::vector<MapShape>& shapes)
      : shapes_(shapes), type_(like.scalar_type()), device_(like.device()) {
    for (const MapShape& shape : shapes) {
      sums_.push_back(empty(shape, accumulate_type(type_)));
      zero_fill(sums_.back());
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
