// Where RoIAlign samples along one axis, and which cells a sample reads. Needs no torch header.
//
// RoIAlign is separable: the weight of a cell in a bin is the product of a weight of its row and a
// weight of its column. Everything here is therefore about one axis. The numbers are those of
// torchvision's roi_align with aligned=True (Mask R-CNN, arXiv 1703.06870).
#pragma once

#include <cmath>

#include "hkd/macros.h"

namespace hkd {

// a * b, rounded before anything is added: a fused multiply-add would move samples across the
// border of the map on some machines. (On the CPU the callers are compiled without.)
template <typename Acc>
HKD_HD Acc rounded_product(Acc a, Acc b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Acc) == sizeof(float)) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

// The samples of one axis of a box: `grid` of them in each of `bins` bins.
template <typename Acc>
struct AxisSamples {
  Acc start; // cells; the centre of cell j is at j
  Acc bin;   // cells a bin
  Acc grid;  // a whole number; 0 where nothing is sampled

  HKD_HD Acc position(int bin_index, Acc sample) const {
    return start + rounded_product(static_cast<Acc>(bin_index), bin) +
           (sample + Acc(0.5)) * bin / grid;
  }
};

// `low` and `high` are the sides of the box in pixels; sampling_ratio 0 takes ceil(bin) samples.
// Sides that are not finite, or too far apart for Acc, are not sampled.
template <typename Acc>
HKD_HD AxisSamples<Acc> axis_samples(
    Acc low, Acc high, Acc cells_per_pixel, int bins, int sampling_ratio) {
  AxisSamples<Acc> axis;
  axis.start = rounded_product(low, cells_per_pixel) - Acc(0.5);
  axis.bin =
      (rounded_product(high, cells_per_pixel) - Acc(0.5) - axis.start) / static_cast<Acc>(bins);
  const bool finite = axis.bin - axis.bin == 0 && axis.start - axis.start == 0;
  axis.grid = sampling_ratio > 0 ? static_cast<Acc>(sampling_ratio) : std::ceil(axis.bin);
  axis.grid = finite && axis.grid > 0 ? axis.grid : Acc(0);
  return axis;
}

// The two cells that a bilinear sample reads, with their weights.
template <typename Acc>
struct Bilinear {
  int low, high;
  Acc low_weight, high_weight;
};

// False for a sample more than one cell outside the axis; a nearer one is moved to the border.
template <typename Acc>
HKD_HD bool bilinear(Acc position, int length, Bilinear<Acc>* taps) {
  if (!(position >= -1 && position <= static_cast<Acc>(length)) || length <= 0) {
    return false;
  }
  const Acc inside = position > 0 ? position : Acc(0);
  taps->low = static_cast<int>(inside);
  if (taps->low >= length - 1) {
    taps->low = taps->high = length - 1;
    taps->low_weight = 1;
    taps->high_weight = 0;
  } else {
    taps->high = taps->low + 1;
    taps->high_weight = inside - static_cast<Acc>(taps->low);
    taps->low_weight = 1 - taps->high_weight;
  }
  return true;
}

} // namespace hkd
