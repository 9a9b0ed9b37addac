// RoIAlign of one box on the CPU, and its gradient, for a range of channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "hkd/axis_weights.h"
#include "hkd/feature_map.h"
#include "roi_align/rois.h"

namespace hkd {

struct MapShape {
  int64_t images, channels, height, width;
  bool channels_last;
};

// A map of any of the stored types.
struct StoredMap {
  FeatureMap<const void> map;
  ScalarType type;

  template <typename T>
  FeatureMap<const T> as() const {
    return {
        static_cast<const T*>(map.data),
        map.images,
        map.channels,
        map.height,
        map.width,
        map.channels_last};
  }
};

// Where a box lies on a map, and with which weights its bins read the rows and columns.
template <typename Acc>
struct BoxWeights {
  int64_t image;
  AxisWeights<Acc> rows, columns;

  // With `gradient` the weights can also be used backwards. Memory of earlier boxes is used again.
  void build(
      const Roi<Acc>& roi,
      const RoiOptions& options,
      int64_t height,
      int64_t width,
      bool gradient) {
    const Acc scale = static_cast<Acc>(1 / options.strides[roi.level]);
    const int p = static_cast<int>(options.rows), q = static_cast<int>(options.columns);
    const int sampling = static_cast<int>(options.sampling_ratio);
    image = roi.image;
    rows.build(axis_samples(roi.y1, roi.y2, scale, p, sampling), p, static_cast<int>(height));
    columns.build(axis_samples(roi.x1, roi.x2, scale, q, sampling), q, static_cast<int>(width));
    if (gradient) {
      rows.transpose();
      columns.transpose();
    }
  }
};

// Memory of one thread, kept from box to box.
template <typename Acc>
struct PoolingScratch {
  std::vector<Acc> cells, planes, values, other;
};

template <typename Acc>
Acc* reserve(std::vector<Acc>& scratch, int64_t size) {
  if (static_cast<int64_t>(scratch.size()) < size) {
    scratch.resize(size);
  }
  return scratch.data();
}

// Channels of an NCHW map that are pooled together: their rows of bins fill whole vectors.
constexpr int64_t kPlanes = 8;

// Pooled values of one box, or the gradient of them, for channels [first, first + count): runs of
// numbers, `stride` apart. Of cells (NHWC) a run is a bin, and holds the channels; of planes (NCHW)
// it is a column of bins, and holds [channel][bin row] and padding.
template <typename Acc>
struct Piece {
  int64_t box, first, count;
  int64_t rows, columns; // of bins
  bool planes;
  Acc* values;
  int64_t stride;

  int64_t runs() const {
    return planes ? columns : rows * columns;
  }
  int64_t run() const {
    return planes ? count * rows : count;
  }
  // Where a bin and a channel, counted from `first`, is.
  int64_t at(int64_t row, int64_t column, int64_t channel) const {
    return planes ? column * stride + channel * rows + row
                  : (row * columns + column) * stride + channel;
  }
  // The smallest stride; whole vectors of any instruction set are written to planes.
  static int64_t packed_stride(bool planes, int64_t rows, int64_t count) {
    return planes ? (count * rows + 15) / 16 * 16 : count;
  }
};

// What follows is compiled for the best instruction set, for float and double.

// Pools RoIAlign(map - minus) into the piece, which has the layout of `map`; `minus` may be null.
template <typename Acc>
void pool(
    const BoxWeights<Acc>& box,
    const StoredMap& map,
    const StoredMap* minus,
    const Piece<Acc>& piece,
    PoolingScratch<Acc>& scratch);

// Adds RoIAlign transposed of bins[bin][channel] to rows [begin, end) of an NHWC gradient.
template <typename Acc>
void scatter_cells(
    const BoxWeights<Acc>& box,
    const FeatureMap<Acc>& gradient,
    int begin,
    int end,
    const Acc* bins,
    PoolingScratch<Acc>& scratch);

// Adds RoIAlign transposed of a piece of planes to an NCHW gradient.
template <typename Acc>
void scatter_planes(
    const BoxWeights<Acc>& box,
    const FeatureMap<Acc>& gradient,
    const Piece<Acc>& piece,
    PoolingScratch<Acc>& scratch);

} // namespace hkd
