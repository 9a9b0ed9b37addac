// The CUDA kernels of RoI distillation as their callers see them. Needs no torch header.
//
// As on the CPU there are two routes for the boxes of a level. `difference`: pooled(S) - pooled(T)
// is pooled(S - T), one tile of bins in shared memory. `rows`: cosine and adapters need every
// channel of a bin, so some boxes at a time are pooled into rows (bins, channels) of Acc, which the
// adapter multiplies. Both leave pairs (sum of the distances, 0) for finish_loss.
#pragma once

#include "hkd/distances.h"
#include "roi_align/roi_kernels.h"

namespace hkd {

// How the boxes of each level are compared.
struct RoiComparison {
  Distance distance;
  uint32_t difference_levels; // a bit a level

  HKD_HD bool by_difference(int level) const {
    return difference_levels >> level & 1;
  }
};

// Gradients are those of the sum of the distances times grad / normalizer.
struct RoiLossScale {
  const void* grad;
  double normalizer;
};

// ------------------------------------------------------------------------- difference
int64_t roi_difference_blocks(const Sampling& sampling, int64_t channels, int64_t rois);
void roi_difference(
    const RoiPyramid& student,
    const RoiPyramid& teacher,
    const Sampling& sampling,
    const Rois& rois,
    const RoiComparison& comparison,
    void* pairs,
    bool is_double,
    cudaStream_t stream);
// For the levels that have blocks in `gradients`.
void roi_difference_backward(
    const RoiGradients& gradients,
    const RoiPyramid& student,
    const RoiPyramid& teacher,
    const Sampling& sampling,
    const Rois& rois,
    const RoiGroups& groups,
    const RoiComparison& comparison,
    const RoiLossScale& scale,
    bool is_double,
    cudaStream_t stream);

// The same by scattering, to gradients of float.
void roi_difference_scatter(
    const RoiPyramid& gradients,
    const RoiPyramid& student,
    const RoiPyramid& teacher,
    const Sampling& sampling,
    const Rois& rois,
    const RoiComparison& comparison,
    const RoiLossScale& scale,
    cudaStream_t stream);

// ------------------------------------------------------------------------- rows
// The RoIs [begin, begin + count) of a call; row r of a buffer is bin r % bins of one of them.
struct RoiRows {
  int64_t begin, count;
};

// out (rows, width_out) = rows (rows, width_in) times the adapter of the level, plus its bias;
// `transposed` takes gradients back: times the transposed weight. A level without copies.
struct RoiAdapters {
  const void* weights[kMaxLevels]; // (C_t, C_s), or null
  const void* biases[kMaxLevels];  // (C_t,), or null
};
void roi_product(
    const void* rows,
    int64_t width_in,
    const RoiAdapters& adapters,
    bool transposed,
    const Sampling& sampling,
    const Rois& rois,
    const RoiRows& range,
    void* out,
    int64_t width_out,
    bool is_double,
    cudaStream_t stream);

// Compares rows of `width` channels, of boxes whose level is not compared by difference.
int64_t roi_rows_blocks(const Sampling& sampling, int64_t rois);
void roi_rows(
    const void* student,
    const void* teacher,
    int64_t width,
    const Sampling& sampling,
    const Rois& rois,
    const RoiRows& range,
    const RoiComparison& comparison,
    void* pairs,
    bool is_double,
    cudaStream_t stream);
// The student's rows become their gradient.
void roi_rows_backward(
    void* student,
    const void* teacher,
    int64_t width,
    const Sampling& sampling,
    const Rois& rois,
    const RoiRows& range,
    const RoiComparison& comparison,
    const RoiLossScale& scale,
    bool is_double,
    cudaStream_t stream);

// Gradient of one weight, over the boxes of the levels that use it (a bit each): a product of
// gradients (rows, C_t) transposed and inputs (rows, C_s), summed by slices of boxes into
// partial[slice][C_t][C_s].
int64_t adapter_gradient_slices(int64_t rois);
void adapter_gradient(
    const void* gradients,
    int64_t width_out,
    const void* inputs,
    int64_t width_in,
    uint32_t levels,
    const Sampling& sampling,
    const Rois& rois,
    const RoiRows& range,
    void* partial,
    bool is_double,
    cudaStream_t stream);
// The same of a bias, sums of the gradients: partial[slice][C_t] of double, since they cancel more.
void bias_gradient(
    const void* gradients,
    int64_t width,
    uint32_t levels,
    const Sampling& sampling,
    const Rois& rois,
    const RoiRows& range,
    double* partial,
    bool is_double,
    cudaStream_t stream);
// total (+)= the slices, in their order.
void add_slices(
    const void* partial,
    int64_t slices,
    int64_t size,
    bool first,
    void* total,
    bool is_double,
    cudaStream_t stream);

} // namespace hkd
