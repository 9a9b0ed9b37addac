// From lists of boxes to RoIs that know their image, level and row, in an order that is kind to
// caches.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "hkd/box_levels.h"
#include "roi_align/options.h"

namespace hkd {

// A box in pixels, and the row of the pooled tensor that it fills.
template <typename Acc>
struct Roi {
  Acc x1, y1, x2, y2;
  int image, level;
  int64_t row;
};

// Neighbours in the list read neighbouring cells: sorted by level, image, strip of columns and row
// (which measured faster than bands of rows: rows of a map are far apart in memory anyway). Equal
// boxes stay in their order, so that the list depends on the arguments alone.
template <typename Acc>
std::vector<Roi<Acc>> make_rois(
    const std::vector<torch::stable::Tensor>& boxes, const std::vector<double>& strides) {
  constexpr double kStripCells = 16;
  std::vector<float> log2_strides;
  for (const double stride : strides) {
    log2_strides.push_back(static_cast<float>(std::log2(stride)));
  }
  const int levels = static_cast<int>(strides.size());

  struct Entry {
    uint64_t key;
    Roi<Acc> roi;
  };
  std::vector<Entry> entries;
  const auto whole = [](Acc x) {
    return static_cast<uint64_t>(x > 0 ? (x < 65535 ? x : 65535) : 0);
  };
  for (std::size_t image = 0; image < boxes.size(); ++image) {
    STD_TORCH_CHECK(
        boxes[image].is_cpu() && boxes[image].dim() == 2 && boxes[image].size(1) == 4,
        "boxes must be (R, 4) tensors on the CPU.");
    const auto list = torch::stable::contiguous(boxes[image]);
    const auto add = [&](auto number) {
      using T = decltype(number);
      const T* box = list.template const_data_ptr<T>();
      for (int64_t i = 0; i < list.size(0); ++i, box += 4) {
        Roi<Acc> roi{
            static_cast<Acc>(box[0]),
            static_cast<Acc>(box[1]),
            static_cast<Acc>(box[2]),
            static_cast<Acc>(box[3]),
            static_cast<int>(image),
            box_level(
                static_cast<float>(box[0]),
                static_cast<float>(box[1]),
                static_cast<float>(box[2]),
                static_cast<float>(box[3]),
                log2_strides.data(),
                levels),
            static_cast<int64_t>(entries.size())};
        const Acc strip = static_cast<Acc>(kStripCells * strides[roi.level]);
        const uint64_t key = static_cast<uint64_t>(roi.level) << 56 |
                             static_cast<uint64_t>(image & 0xffffff) << 32 |
                             whole(roi.x1 / strip) << 16 | whole(roi.y1);
        entries.push_back({key, roi});
      }
    };
    if (list.scalar_type() == ScalarType::Double) {
      add(double{});
    } else {
      STD_TORCH_CHECK(list.scalar_type() == ScalarType::Float, "boxes must be float32 or float64.");
      add(float{});
    }
  }
  std::stable_sort(
      entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.key < b.key; });
  std::vector<Roi<Acc>> rois;
  rois.reserve(entries.size());
  for (const auto& entry : entries) {
    rois.push_back(entry.roi);
  }
  return rois;
}

} // namespace hkd
