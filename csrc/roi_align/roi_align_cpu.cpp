// RoIAlign of every box from its own level of a pyramid on the CPU, forward and backward.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "roi_align/blocks.h"
#include "roi_align/gradients.h"
#include "simd.h"

namespace hkd {
namespace {

using torch::stable::Tensor;

// The channels of a piece to (count, P, Q), where the pooled tensor has them.
template <typename Acc, typename T>
void write_bins(const Piece<Acc>& piece, T* to, PoolingScratch<Acc>& scratch) {
  with_lanes<Acc>([&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    const int64_t size = piece.runs() * piece.run();
    if constexpr (std::is_same_v<T, Acc>) {
      transpose<kLanes>(piece.values, piece.stride, piece.runs(), piece.run(), to, piece.runs());
    } else {
      Acc* bins = reserve(scratch.other, size);
      transpose<kLanes>(piece.values, piece.stride, piece.runs(), piece.run(), bins, piece.runs());
      for (int64_t i = 0; i < size; ++i) {
        to[i] = static_cast<T>(bins[i]);
      }
    }
  });
}

// The same backwards.
template <typename Acc, typename T>
void read_bins(const T* from, const Piece<Acc>& piece, PoolingScratch<Acc>& scratch) {
  with_lanes<Acc>([&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    const int64_t size = piece.runs() * piece.run();
    const Acc* bins;
    if constexpr (std::is_same_v<T, Acc>) {
      bins = from;
    } else {
      Acc* converted = reserve(scratch.other, size);
      for (int64_t i = 0; i < size; ++i) {
        converted[i] = static_cast<Acc>(from[i]);
      }
      bins = converted;
    }
    transpose<kLanes>(bins, piece.runs(), piece.run(), piece.runs(), piece.values, piece.stride);
  });
}

Tensor multilevel_roi_align_cpu(
    std::vector<Tensor> features,
    std::vector<Tensor> boxes,
    std::vector<double> strides,
    int64_t rows,
    int64_t columns,
    int64_t sampling_ratio) {
  const RoiOptions options{strides, rows, columns, sampling_ratio};
  check_pyramid(features, boxes, options);
  const std::vector<Tensor> stored = as_stored(features);
  const std::vector<StoredMap> maps = stored_maps(stored);
  const int64_t channels = features[0].size(1);
  int64_t count = 0;
  for (const Tensor& list : boxes) {
    count += list.size(0);
  }
  Tensor pooled = torch::stable::new_empty(features[0], {count, channels, rows, columns});

  dispatch_floating(features[0].scalar_type(), "features", [&](auto number) {
    using T = decltype(number);
    using Acc = accumulate_t<T>;
    T* out = pooled.mutable_data_ptr<T>();
    RoiBlocks<Acc> blocks(boxes, options, map_shapes(maps), false);
    blocks.for_each(count, [&](const RoiBlock& block) {
      const StoredMap& map = maps[block.level];
      blocks.for_each_piece(
          block,
          map.map.channels_last,
          channels,
          [&](const Piece<Acc>& piece, PoolingScratch<Acc>& scratch) {
            pool(blocks.weights(piece.box), map, nullptr, piece, scratch);
            T* to = out + (blocks.row(piece.box) * channels + piece.first) * options.bins();
            write_bins(piece, to, scratch);
          });
    });
  });
  return pooled;
}

std::vector<Tensor> multilevel_roi_align_backward_cpu(
    const Tensor& grad,
    std::vector<Tensor> boxes,
    std::vector<double> strides,
    int64_t sampling_ratio,
    std::vector<int64_t> heights,
    std::vector<int64_t> widths,
    std::vector<bool> channels_last,
    bool) { // deterministic, as it always is
  STD_TORCH_CHECK(
      grad.dim() == 4 && grad.is_cpu() && heights.size() == strides.size() &&
          widths.size() == strides.size() && channels_last.size() == strides.size(),
      "grad must be (R, C, rows, columns) on the CPU; give a height, a width and a layout a "
      "level.");
  const RoiOptions options{strides, grad.size(2), grad.size(3), sampling_ratio};
  const int64_t channels = grad.size(1);
  std::vector<MapShape> shapes;
  for (std::size_t level = 0; level < strides.size(); ++level) {
    shapes.push_back(
        {static_cast<int64_t>(boxes.size()),
         channels,
         heights[level],
         widths[level],
         channels_last[level]});
  }
  Gradients gradients(grad, shapes);
  const Tensor upstream = torch::stable::contiguous(grad);

  dispatch_floating(grad.scalar_type(), "grad", [&](auto number) {
    using T = decltype(number);
    using Acc = accumulate_t<T>;
    const std::vector<FeatureMap<Acc>> maps = gradients.maps<Acc>();
    const T* in = upstream.const_data_ptr<T>();
    RoiBlocks<Acc> blocks(boxes, options, shapes, true);
    STD_TORCH_CHECK(blocks.count() == grad.size(0), "grad must have a row a box.");
    const auto every_level = [](int) { return true; };
    blocks.scatter(
        blocks.all(),
        maps,
        every_level,
        [&](const Piece<Acc>& piece, PoolingScratch<Acc>& scratch) {
          const int64_t row = blocks.row(piece.box);
          read_bins(in + (row * channels + piece.first) * options.bins(), piece, scratch);
        });
  });
  return gradients.finish();
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, CPU, m) {
  m.impl("multilevel_roi_align", TORCH_BOX(&multilevel_roi_align_cpu));
  m.impl("multilevel_roi_align_backward", TORCH_BOX(&multilevel_roi_align_backward_cpu));
}

} // namespace hkd
