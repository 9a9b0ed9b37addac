// Arguments of the RoI operators as tensors, checked, and as the CUDA kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "dense_layout.h"
#include "device_call.h"
#include "feature_maps.h"
#include "roi_align/roi_kernels.h"

namespace hkd {

using torch::stable::Tensor;

inline bool is_double(ScalarType type) {
  return type == ScalarType::Double;
}

inline Tensor device_memory(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

inline RoiMap roi_map(const Numbers& numbers, const Tensor& map, bool in_double) {
  const bool channels_last = !map.is_contiguous();
  const bool packs = channels_last && map.size(1) % roi_pack(in_double) == 0 &&
                     (in_double || numbers.storage != Storage::kDouble) &&
                     reinterpret_cast<uintptr_t>(numbers.data) % 16 == 0;
  return {numbers, channels_last, packs};
}

// The kernels' view of maps that `as_stored` has returned; the sums are those of `type`.
inline RoiPyramid roi_pyramid(const std::vector<Tensor>& maps, ScalarType type) {
  RoiPyramid pyramid{};
  pyramid.channels = maps[0].size(1);
  for (std::size_t level = 0; level < maps.size(); ++level) {
    pyramid.maps[level] =
        roi_map(numbers_to_read("A feature map", maps[level]), maps[level], is_double(type));
  }
  return pyramid;
}

inline void check_levels(const std::vector<double>& strides) {
  STD_TORCH_CHECK(
      strides.size() <= kMaxLevels, "On a GPU there may be ", kMaxLevels, " levels at most.");
}

// Shapes are refused here once more, since whoever calls the operator itself has no other guard.
inline void check_pyramid(
    const std::vector<Tensor>& features,
    const std::vector<Tensor>& boxes,
    const std::vector<double>& strides) {
  STD_TORCH_CHECK(
      !features.empty() && features.size() == strides.size(), "Give one stride a level.");
  check_levels(strides);
  for (const auto& map : features) {
    STD_TORCH_CHECK(
        same_device(map, features[0]) && map.dim() == 4 &&
            map.size(0) == static_cast<int64_t>(boxes.size()) &&
            map.size(1) == features[0].size(1) && map.scalar_type() == features[0].scalar_type(),
        "Every level must be (N, C, H, W) on one device, with as many images as lists of boxes, "
        "and of one width and dtype.");
  }
}

// Bins of rows of a tensor, (R, C, P, Q).
inline Bins bins_of(const Numbers& numbers, int64_t channels, const Sampling& sampling) {
  return {numbers, channels, sampling.bins(), 1};
}

// The boxes of a call on the device, as the levels sample them.
class [[gnu::visibility("hidden")]] RoiTable {
 public:
  // With `gradient` there can be grouped.
  RoiTable(
      const Tensor& like,
      const std::vector<Tensor>& boxes,
      const std::vector<double>& strides,
      const std::vector<int64_t>& heights,
      const std::vector<int64_t>& widths,
      int64_t rows,
      int64_t columns,
      int64_t sampling_ratio,
      bool gradient,
      cudaStream_t stream)
      : in_double_(is_double(like.scalar_type())), stream_(stream) {
    STD_TORCH_CHECK(rows > 0 && columns > 0, "Give at least one bin.");
    check_levels(strides);
    sampling.rows = static_cast<int32_t>(rows);
    sampling.columns = static_cast<int32_t>(columns);
    sampling.sampling_ratio = static_cast<int32_t>(sampling_ratio);
    sampling.levels = static_cast<int32_t>(strides.size());
    sampling.images = static_cast<int64_t>(boxes.size());
    for (std::size_t level = 0; level < strides.size(); ++level) {
      sampling.log2_strides[level] = static_cast<float>(std::log2(strides[level]));
      sampling.cells_per_pixel[level] = 1 / strides[level];
      sampling.heights[level] = static_cast<int32_t>(heights[level]);
      sampling.widths[level] = static_cast<int32_t>(widths[level]);
    }
    for (const Tensor& list : boxes) {
      STD_TORCH_CHECK(
          same_device(list, like) && list.dim() == 2 && list.size(1) == 4 &&
              (list.scalar_type() == ScalarType::Float || is_double(list.scalar_type())),
          "boxes must be (R, 4) tensors of float32 or float64 on the device of the maps.");
      boxes_.push_back(torch::stable::contiguous(list));
      rois.count += list.size(0);
    }
    table_ = device_memory(like, rois.count * sampled_roi_bytes(in_double_));
    touched_ = device_memory(like, gradient ? rois.count * int64_t(sizeof(CellRange)) : 0);
    rois.rois = table_.mutable_data_ptr();
    rois.touched = gradient ? static_cast<CellRange*>(touched_.mutable_data_ptr()) : nullptr;

    BoxLists lists{};
    for (std::size_t image = 0; image < boxes_.size(); ++image) {
      const Tensor& list = boxes_[image];
      if (lists.count == 0) {
        lists.first_image = static_cast<int32_t>(image);
      }
      lists.boxes[lists.count] = list.const_data_ptr();
      lists.is_double[lists.count] = is_double(list.scalar_type());
      lists.first_row[lists.count + 1] = lists.first_row[lists.count] + list.size(0);
      ++lists.count;
      if (lists.count == kMaxImages || image + 1 == boxes_.size()) {
        if (lists.first_row[lists.count] > lists.first_row[0]) {
          sample_boxes(lists, sampling, rois, in_double_, stream);
        }
        lists.first_row[0] = lists.first_row[lists.count];
        lists.count = 0;
      }
    }
  }

  // The RoIs of the rows [begin, end) by level and image; there must be a level and an image.
  RoiGroups groups(int64_t begin, int64_t end) {
    const int64_t count = end - begin, starts = sampling.levels * sampling.images + 1;
    groups_ = device_memory(
        table_, count * int64_t(sizeof(CellRange)) + (count + starts) * int64_t(sizeof(int32_t)));
    RoiGroups groups;
    groups.touched = static_cast<CellRange*>(groups_.mutable_data_ptr());
    groups.rows = reinterpret_cast<int32_t*>(groups.touched + count);
    groups.starts = groups.rows + count;
    group_rois(rois, sampling, begin, end, groups, in_double_, stream_);
    return groups;
  }

  Sampling sampling{};
  Rois rois{};

 private:
  bool in_double_;
  cudaStream_t stream_;
  std::vector<Tensor> boxes_; // kept until the kernels are launched
  Tensor table_, touched_, groups_;
};

// Gradients of a pyramid that are allocated, but not written.
class [[gnu::visibility("hidden")]] PyramidGradients {
 public:
  // `type` is that of the gradients, `sums` of the numbers that are added up.
  PyramidGradients(
      const Tensor& like,
      ScalarType type,
      const Sampling& sampling,
      int64_t channels,
      const std::vector<bool>& channels_last,
      const std::vector<Tensor>& given) {
    STD_TORCH_CHECK(
        given.empty() || given.size() == channels_last.size(),
        "incoming must be empty or hold one gradient a level.");
    for (std::size_t level = 0; level < channels_last.size(); ++level) {
      const auto empty = [&] {
        return torch::stable::empty(
            {sampling.images, channels, sampling.heights[level], sampling.widths[level]},
            type,
            std::nullopt,
            like.device(),
            std::nullopt,
            channels_last[level] ? torch::headeronly::MemoryFormat::ChannelsLast
                                 : torch::headeronly::MemoryFormat::Contiguous);
      };
      tensors.push_back(empty());
      const Tensor& map = tensors.back();
      RoiMap& view = kernels.maps[level];
      view = roi_map(numbers_to_write(map), map, is_double(type));
      if (given.empty()) {
        continue;
      }
      STD_TORCH_CHECK(
          given[level].dim() == 4 && given[level].numel() == map.numel() &&
              same_device(given[level], like),
          "incoming must have the shapes of the maps and be on their device.");
      Tensor readable = given[level];
      if (!lie_alike(readable, map)) {
        readable = empty();
        torch::stable::copy_(readable, given[level]);
      }
      const Numbers numbers = numbers_to_read("incoming", readable);
      kernels.incoming[level] = numbers;
      view.packs = view.packs && reinterpret_cast<uintptr_t>(numbers.data) % 16 == 0;
      incoming_.push_back(readable);
    }
    kernels.channels = channels;
  }

  std::vector<Tensor> tensors;
  RoiGradients kernels{};

 private:
  std::vector<Tensor> incoming_; // kept until the kernels are launched
};

} // namespace hkd
