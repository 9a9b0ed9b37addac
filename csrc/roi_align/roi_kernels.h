// The CUDA kernels of RoIAlign as their callers see them. Needs no torch header.
//
// A call reads its lists of boxes once (sample_boxes) into a table of RoIs on the device: level,
// image and where the samples of both axes lie. Everything else goes by that table, so that one
// launch takes every level and image and the host never waits.
//
// Acc, the type that is computed in, is double where `is_double`, otherwise float. Void pointers
// that are not said to be otherwise point to Acc on the device.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "hkd/macros.h"
#include "hkd/roi_sampling.h"
#include "hkd/storage.h"

namespace hkd {

constexpr int kMaxLevels = 16; // of a pyramid
constexpr int kMaxImages = 64; // whose boxes one launch reads

// ------------------------------------------------------------------------------------- RoIs
// A box as its level samples it.
template <typename Acc>
struct SampledRoi {
  AxisSamples<Acc> rows, columns;
  int32_t level, image;
};

// How boxes become RoIs: bins, and the shapes of the levels.
struct Sampling {
  int32_t rows, columns, sampling_ratio; // bins, samples a bin and axis or 0
  int32_t levels;
  int64_t images;
  float log2_strides[kMaxLevels];
  double cells_per_pixel[kMaxLevels];
  int32_t heights[kMaxLevels], widths[kMaxLevels];

  HKD_HD int32_t bins() const {
    return rows * columns;
  }
};

// The lists of boxes of neighbouring images: (R_n, 4) of float or double, one after the other.
struct BoxLists {
  const void* boxes[kMaxImages];
  bool is_double[kMaxImages];
  int64_t first_row[kMaxImages + 1]; // of each image, and where the last ends
  int32_t first_image, count;
};

// Cells of a level that a RoI may touch: rows [top, bottom), columns [left, right).
struct alignas(16) CellRange {
  int32_t top, bottom, left, right;
};

// The table, one entry a row of the pooled tensor. Backward also reads where RoIs lie.
struct Rois {
  void* rois;         // SampledRoi<Acc>
  CellRange* touched; // or null
  int64_t count;
};
int64_t sampled_roi_bytes(bool is_double);
void sample_boxes(
    const BoxLists& lists,
    const Sampling& sampling,
    const Rois& rois,
    bool is_double,
    cudaStream_t stream);

// RoIs by level and image, each group in the order of the rows.
struct RoiGroups {
  CellRange* touched; // one a RoI
  int32_t* rows;      // one a RoI
  int32_t* starts;    // levels * images + 1: where a group begins
};
// Takes the rows [begin, end).
void group_rois(
    const Rois& rois,
    const Sampling& sampling,
    int64_t begin,
    int64_t end,
    const RoiGroups& groups,
    bool is_double,
    cudaStream_t stream);

// ------------------------------------------------------------------------------------- maps
// Channels of a pack.
constexpr int roi_pack(bool is_double) {
  return is_double ? 4 : 8;
}

struct RoiMap {
  Numbers numbers;
  bool channels_last;
  bool packs; // channels are neighbours, and packs of them, not wider than Acc, may be read at once
};

// One map a level, (N, C, H, W) each.
struct RoiPyramid {
  RoiMap maps[kMaxLevels];
  int64_t channels;
};

// Values of bins: (R, C, P, Q), or (R, P, Q, C) where `channel_stride` is 1.
struct Bins {
  Numbers numbers;
  int64_t channels, channel_stride, bin_stride;
};

// Pools the rows [begin, end) into [0, end - begin) of `bins`.
void roi_align(
    const RoiPyramid& pyramid,
    const Sampling& sampling,
    const Rois& rois,
    int64_t begin,
    int64_t end,
    const Bins& bins,
    bool is_double,
    cudaStream_t stream);

// Gradients of a pyramid by gathering: each cell is written once, the sum over its RoIs.
struct RoiGradients {
  RoiPyramid pyramid;
  int32_t first_block[kMaxLevels]; // of each level
  int64_t blocks;
  bool adds; // to what is there; cells without a RoI are left as they are
};
// Gives blocks to the levels that `takes` names.
void set_gradient_blocks(const Sampling& sampling, const bool* takes, RoiGradients* gradients);

// `upstream` has the gradients of the bins of the rows from `begin` on.
void roi_align_backward(
    const RoiGradients& gradients,
    const Sampling& sampling,
    const Rois& rois,
    const RoiGroups& groups,
    const Bins& upstream,
    int64_t begin,
    bool is_double,
    cudaStream_t stream);

// The same by scattering: adds the rows [begin, end) of the levels that `levels` names, a bit each,
// to gradients of float. The order of the additions, and so the last bits, differ between runs.
void roi_align_scatter(
    const RoiPyramid& gradients,
    uint32_t levels,
    const Sampling& sampling,
    const Rois& rois,
    const Bins& upstream,
    int64_t begin,
    int64_t end,
    cudaStream_t stream);

} // namespace hkd
