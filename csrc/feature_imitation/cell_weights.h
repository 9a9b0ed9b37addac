// Mask weights of the cells of one image on one level, painted from boxes. Needs no torch header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hkd/box_levels.h"
#include "hkd/rasterize.h"

namespace hkd {

// One level of an image as boxes are painted on it.
struct Canvas {
  float* weights; // (height, width)
  int64_t height, width;
  double stride;
};

// The (R, 4) boxes that belong to a level, all of them where `level` is -1.
template <typename T>
std::vector<Box<T>> boxes_of_level(
    const T* boxes, int64_t count, int level, const std::vector<float>& log2_strides) {
  std::vector<Box<T>> chosen;
  for (int64_t i = 0; i < count; ++i) {
    const Box<T> box = {boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]};
    const auto own = [&] {
      return box_level(
          static_cast<float>(box.x1),
          static_cast<float>(box.y1),
          static_cast<float>(box.x2),
          static_cast<float>(box.y2),
          log2_strides.data(),
          static_cast<int>(log2_strides.size()));
    };
    if (!box.has_nan() && (level < 0 || own() == level)) {
      chosen.push_back(box);
    }
  }
  return chosen;
}

// Calls visit(weight, area) for every cell under the box; `area` is that of the unclipped box.
template <typename T, typename Visit>
void visit_cells(const Canvas& canvas, const Box<T>& box, Rasterize rule, const Visit& visit) {
  const T stride = static_cast<T>(canvas.stride);
  const CellSpan<T> x = cell_span(box.x1, box.x2, stride, rule);
  const CellSpan<T> y = cell_span(box.y1, box.y2, stride, rule);
  const T area = (y.high - y.low) * (x.high - x.low);
  int64_t top, bottom, left, right;
  y.clip(canvas.height, top, bottom);
  x.clip(canvas.width, left, right);
  for (int64_t i = top; i < bottom; ++i) {
    for (int64_t j = left; j < right; ++j) {
      visit(canvas.weights[i * canvas.width + j], area);
    }
  }
}

// FGFI's rule: calls visit(weight) for the cells with an anchor whose IoU with the box is above a
// share of the best IoU on the level. The IoU of an anchor shape rises with both overlaps, which
// are separable, so the best one is found without looking at every cell.
template <typename T, typename Visit>
void visit_cells_near_anchors(
    const Canvas& canvas,
    const Box<T>& box,
    const std::vector<T>& anchors,
    const CellWeightRule& rule,
    const Visit& visit) {
  const T stride = static_cast<T>(canvas.stride), offset = static_cast<T>(rule.anchor_offset);
  const T box_area = std::max(box.x2 - box.x1, T(0)) * std::max(box.y2 - box.y1, T(0));
  const int64_t shapes = anchors.size() / 2;
  std::vector<T> across(shapes * canvas.width), down(shapes * canvas.height);
  T best = 0;
  for (int64_t a = 0; a < shapes; ++a) {
    const T width = anchors[2 * a], height = anchors[2 * a + 1];
    T most_across = 0, most_down = 0;
    for (int64_t j = 0; j < canvas.width; ++j) {
      const T overlap = anchor_overlap(box.x1, box.x2, j, offset, stride, width);
      most_across = std::max(most_across, across[a * canvas.width + j] = overlap);
    }
    for (int64_t i = 0; i < canvas.height; ++i) {
      const T overlap = anchor_overlap(box.y1, box.y2, i, offset, stride, height);
      most_down = std::max(most_down, down[a * canvas.height + i] = overlap);
    }
    best = std::max(best, overlap_ratio(most_down, most_across, width * height, box_area));
  }
  const T least = static_cast<T>(rule.anchor_threshold) * best;
  for (int64_t a = 0; a < shapes; ++a) {
    const T anchor_area = anchors[2 * a] * anchors[2 * a + 1];
    for (int64_t i = 0; i < canvas.height; ++i) {
      const T overlap = down[a * canvas.height + i];
      for (int64_t j = 0; overlap > 0 && j < canvas.width; ++j) {
        if (overlap_ratio(overlap, across[a * canvas.width + j], anchor_area, box_area) > least) {
          visit(canvas.weights[i * canvas.width + j]);
        }
      }
    }
  }
}

// Cells are marked -1 first, which means: under no box.
template <typename T>
void paint_boxes(
    const Canvas& canvas,
    const std::vector<Box<T>>& boxes,
    const std::vector<T>& anchors,
    const CellWeightRule& rule) {
  for (const Box<T>& box : boxes) {
    if (rule.rasterize == Rasterize::kFgfi) {
      visit_cells_near_anchors(
          canvas, box, anchors, rule, [&](float& weight) { weight = rule.foreground; });
    } else {
      visit_cells(canvas, box, rule.rasterize, [&](float& weight, T area) {
        const float share = rule.per_area ? static_cast<float>(1 / area) : 1.0f;
        weight = std::max(weight, rule.foreground * share);
      });
    }
  }
}

template <typename T>
void paint_ignored(
    const Canvas& canvas, const std::vector<Box<T>>& boxes, const CellWeightRule& rule) {
  // A region to ignore is no object, so FGFI's anchors say nothing about it.
  const bool anchors = rule.rasterize == Rasterize::kFgfi;
  for (const Box<T>& box : boxes) {
    visit_cells(canvas, box, anchors ? Rasterize::kCells : rule.rasterize, [](float& weight, T) {
      weight = weight < 0 ? 0 : weight;
    });
  }
}

// The sum of the weights once the cells that are still marked have the background's.
inline double paint_background(const Canvas& canvas, const CellWeightRule& rule) {
  constexpr int kLanes = 8;
  double sums[kLanes] = {};
  const int64_t cells = canvas.height * canvas.width;
  for (int64_t i = 0; i < cells; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, cells - i);
    for (int64_t l = 0; l < count; ++l) {
      float& weight = canvas.weights[i + l];
      weight = weight < 0 ? rule.background : weight;
      sums[l] += weight;
    }
  }
  double total = 0;
  for (const double sum : sums) {
    total += sum;
  }
  return total;
}

} // namespace hkd
