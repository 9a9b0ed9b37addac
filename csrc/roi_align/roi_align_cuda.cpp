// RoIAlign of every box from its own level on the GPU: arguments and results of the kernels.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "roi_align/roi_arguments.h"

namespace hkd {
namespace {

Tensor multilevel_roi_align_cuda(
    std::vector<Tensor> features,
    std::vector<Tensor> boxes,
    std::vector<double> strides,
    int64_t rows,
    int64_t columns,
    int64_t sampling_ratio) {
  const RoiOptions options{strides, rows, columns, sampling_ratio};
  check_pyramid(features, boxes, options);
  const DeviceCall call(features[0]);
  const ScalarType type = features[0].scalar_type();
  const std::vector<Tensor> stored = as_stored(features);
  const RoiTable table(
      features[0], boxes, options, lengths(stored, 2), lengths(stored, 3), false, call.stream());
  const int64_t channels = features[0].size(1);
  Tensor pooled =
      torch::stable::new_empty(features[0], {table.rois.count, channels, rows, columns});
  if (pooled.numel() > 0) {
    roi_align(
        roi_pyramid(stored, type),
        table.sampling,
        table.rois,
        0,
        table.rois.count,
        bins_of(numbers_to_write(pooled), channels, table.sampling),
        is_double(type),
        call.stream());
  }
  return pooled;
}

std::vector<Tensor> multilevel_roi_align_backward_cuda(
    const Tensor& grad,
    std::vector<Tensor> boxes,
    std::vector<double> strides,
    int64_t sampling_ratio,
    std::vector<int64_t> heights,
    std::vector<int64_t> widths,
    std::vector<bool> channels_last,
    bool deterministic) {
  STD_TORCH_CHECK(
      grad.dim() == 4 && heights.size() == strides.size() && widths.size() == strides.size() &&
          channels_last.size() == strides.size(),
      "grad must be (R, C, rows, columns); give a height, a width and a layout a level.");
  const DeviceCall call(grad);
  const Tensor upstream = torch::stable::contiguous(grad);
  const RoiOptions options{strides, grad.size(2), grad.size(3), sampling_ratio};
  RoiTable table(grad, boxes, options, heights, widths, true, call.stream());
  STD_TORCH_CHECK(table.rois.count == grad.size(0), "grad must have a row a box.");
  const int64_t channels = grad.size(1);
  PyramidGradients gradients(grad, grad.scalar_type(), table.sampling, channels, channels_last);
  const Bins bins = bins_of(numbers_to_read("grad", upstream), channels, table.sampling);
  if (scatters(grad.scalar_type(), deterministic)) {
    gradients.clear();
    if (upstream.numel() > 0) {
      roi_align_scatter(
          gradients.kernels.pyramid,
          ~0u,
          table.sampling,
          table.rois,
          bins,
          0,
          table.rois.count,
          call.stream());
    }
    return std::move(gradients.tensors);
  }
  bool takes[kMaxLevels];
  std::fill(takes, takes + kMaxLevels, true);
  set_gradient_blocks(table.sampling, takes, &gradients.kernels);
  if (gradients.kernels.blocks > 0) {
    roi_align_backward(
        gradients.kernels,
        table.sampling,
        table.rois,
        table.groups(0, table.rois.count),
        bins,
        0,
        is_double(grad.scalar_type()),
        call.stream());
  }
  return std::move(gradients.tensors);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, HKD_DEVICE, m) {
  m.impl("multilevel_roi_align", TORCH_BOX(&multilevel_roi_align_cuda));
  m.impl("multilevel_roi_align_backward", TORCH_BOX(&multilevel_roi_align_backward_cuda));
}

} // namespace hkd
