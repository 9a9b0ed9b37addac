// Which cells of a feature map lie under a box. Needs no torch header.
//
// Computed in T, the type of the boxes, in the order of operations of the reference in
// hkd_d2/ops/reference.py, so that a border falls on the same side in both.
#pragma once

#include <cmath>
#include <cstdint>

#include "hkd/macros.h"

namespace hkd {

// How a box covers cells; the codes are the places in RASTERIZE_RULES of hkd_d2/ops/_checks.py.
enum class Rasterize : int { kCells, kDefeat, kFgd, kFgfi };

// What a cell weighs: `foreground` under a box, 0 under regions to ignore alone, else `background`.
struct CellWeightRule {
  Rasterize rasterize;
  bool per_area; // a box weighs 1 / its cells
  float foreground, background;
  double anchor_offset, anchor_threshold; // kFgfi
};

template <typename T>
struct Box {
  T x1, y1, x2, y2;

  HKD_HD bool has_nan() const {
    return !(x1 == x1 && y1 == y1 && x2 == x2 && y2 == y2);
  }
};

// Cells low <= j < high along one axis, whole numbers that may lie outside the map.
template <typename T>
struct CellSpan {
  T low, high;

  // The part inside [0, length), as first <= j < last.
  HKD_HD void clip(int64_t length, int64_t& first, int64_t& last) const {
    const T end = static_cast<T>(length);
    first = low > 0 ? (low < end ? static_cast<int64_t>(low) : length) : 0;
    last = high < end ? (high > 0 ? static_cast<int64_t>(high) : 0) : length;
  }
};

// The span of a box from `from` to `to` pixels, neither of them NaN; kFgfi has none.
template <typename T>
HKD_HD CellSpan<T> cell_span(T from, T to, T stride, Rasterize rule) {
  const T low = std::floor(from / stride);
  T high = to / stride;
  if (rule == Rasterize::kFgd) {
    return {low, std::ceil(high) + 1};
  }
  high = rule == Rasterize::kCells ? std::ceil(high) : std::floor(high);
  return {low, high > low + 1 ? high : low + 1};
}

// Overlap in pixels of the box from `from` to `to` and an anchor of `size` centred on a cell.
template <typename T>
HKD_HD T anchor_overlap(T from, T to, int64_t cell, T offset, T stride, T size) {
  const T centre = (static_cast<T>(cell) + offset) * stride;
  const T low = centre - size / 2, high = centre + size / 2;
  const T overlap = (high < to ? high : to) - (low > from ? low : from);
  return overlap > 0 ? overlap : T(0);
}

// Intersection over union of an anchor and a box from the overlaps along both axes.
template <typename T>
HKD_HD T overlap_ratio(T overlap_y, T overlap_x, T anchor_area, T box_area) {
  const T intersection = overlap_y * overlap_x;
  return intersection / (anchor_area + box_area - intersection);
}

} // namespace hkd
