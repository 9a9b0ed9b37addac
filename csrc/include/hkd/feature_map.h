// One level of a feature pyramid as a kernel sees it. Needs no torch header.
#pragma once

#include <cstdint>

#include "hkd/macros.h"

namespace hkd {

// (N, C, H, W) elements of T, stored as NCHW or, channels_last, as NHWC.
template <typename T>
struct FeatureMap {
  T* data;
  int64_t images, channels, height, width;
  bool channels_last;

  // Elements between neighbours along an axis.
  HKD_HD int64_t channel_stride() const {
    return channels_last ? 1 : height * width;
  }
  HKD_HD int64_t column_stride() const {
    return channels_last ? channels : 1;
  }
  HKD_HD int64_t row_stride() const {
    return width * column_stride();
  }
  HKD_HD T* at(int64_t image, int64_t channel, int64_t row, int64_t column) const {
    return data + image * channels * height * width + channel * channel_stride() +
           row * row_stride() + column * column_stride();
  }
};

} // namespace hkd
