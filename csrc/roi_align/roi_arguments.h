// Arguments of the RoI operators as tensors, checked, and as the CUDA kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "device_call.h"
#include "feature_maps.h"
#include "roi_align/options.h"
#include "roi_align/roi_kernels.h"
#include "tensors.h"

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

inline void check_levels(std::size_t levels) {
  STD_TORCH_CHECK(levels <= kMaxLevels, "On a GPU there may be ", kMaxLevels, " levels at most.");
}

// Whether backward scatters: only where HKD_ROI_BACKWARD=scatter, read once, asks for it. `auto`,
// as without the variable, gathers until somebody has measured both. Scattered sums are float32 and
// differ in the last bits between runs, so other dtypes and deterministic algorithms gather.
inline bool scatters(ScalarType type, bool deterministic) {
  static const bool asked = [] {
    const char* given = std::getenv("HKD_ROI_BACKWARD");
    const std::string plan = given == nullptr ? "auto" : given;
    STD_TORCH_CHECK(
        plan == "auto" || plan == "gather" || plan == "scatter",
        "HKD_ROI_BACKWARD is '",
        plan,
        "'; give gather, scatter or auto.");
    return plan == "scatter";
  }();
  return asked && type == ScalarType::Float && !deterministic;
}

// The kernels' view of maps that `as_stored` has returned; the sums are those of `type`.
inline RoiPyramid roi_pyramid(const std::vector<Tensor>& maps, ScalarType type) {
  check_levels(maps.size());
  RoiPyramid pyramid{};
  pyramid.channels = maps[0].size(1);
  for (std::size_t level = 0; level < maps.size(); ++level) {
    pyramid.maps[level] =
        roi_map(numbers_to_read("A feature map", maps[level]), maps[level], is_double(type));
  }
  return pyramid;
}

// Bins of rows of a tensor, (R, C, P, Q).
inline Bins bins_of(const Numbers& numbers, int64_t channels, const Sampling& sampling) {
  return {numbers, channels, sampling.bins(), 1};
}

// The lengths of an axis of maps.
inline std::vector<int64_t> lengths(const std::vector<Tensor>& maps, int64_t axis) {
  std::vector<int64_t> lengths;
  for (const Tensor& map : maps) {
    lengths.push_back(map.size(axis));
  }
  return lengths;
}

// The boxes of a call on the device, as the levels sample them.
class [[gnu::visibility("hidden")]] RoiTable {
 public:
  // `gradient` makes room for the cells that boxes touch, which group_rois reads.
  RoiTable(
      const Tensor& like,
      const std::vector<Tensor>& boxes,
      const RoiOptions& options,
      const std::vector<int64_t>& heights,
      const std::vector<int64_t>& widths,
      bool gradient,
      cudaStream_t stream)
      : in_double_(is_double(like.scalar_type())), stream_(stream) {
    const std::vector<double>& strides = options.strides;
    check_bins(options);
    check_levels(strides.size());
    sampling.rows = static_cast<int32_t>(options.rows);
    sampling.columns = static_cast<int32_t>(options.columns);
    sampling.sampling_ratio = static_cast<int32_t>(options.sampling_ratio);
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
      const std::vector<bool>& channels_last) {
    for (std::size_t level = 0; level < channels_last.size(); ++level) {
      tensors.push_back(
          torch::stable::empty(
              {sampling.images, channels, sampling.heights[level], sampling.widths[level]},
              type,
              std::nullopt,
              like.device(),
              std::nullopt,
              channels_last[level] ? torch::headeronly::MemoryFormat::ChannelsLast
                                   : torch::headeronly::MemoryFormat::Contiguous));
      const Tensor& map = tensors.back();
      kernels.pyramid.maps[level] = roi_map(numbers_to_write(map), map, is_double(type));
    }
    kernels.pyramid.channels = channels;
  }

  void clear() {
    for (Tensor& tensor : tensors) {
      torch::stable::zero_(tensor);
    }
  }

  std::vector<Tensor> tensors;
  RoiGradients kernels{};
};

} // namespace hkd
