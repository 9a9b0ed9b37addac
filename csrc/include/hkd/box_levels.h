// The pyramid level of a box, by Detectron2's rule. Needs no torch header.
#pragma once

#include <cmath>

#include "hkd/macros.h"

namespace hkd {

// Index of the level of the box x1, y1, x2, y2 (pixels) among `levels` strides, finest first, given
// as logarithms to base 2: the coarsest that is not above floor(4 + log2(sqrt(area) / 224 + 1e-8)),
// or 0. A box with NaN is on level 0. (Equation 1 of arXiv 1612.03144.)
HKD_HD int box_level(
    float x1, float y1, float x2, float y2, const float* log2_strides, int levels) {
  const float area = (x2 - x1) * (y2 - y1);
  const float level = std::floor(4 + std::log2(std::sqrt(area > 0 ? area : 0.0f) / 224 + 1e-8f));
  int index = 0;
  for (int i = 1; i < levels; ++i) {
    index += level >= log2_strides[i] ? 1 : 0;
  }
  return index;
}

} // namespace hkd
