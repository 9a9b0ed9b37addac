// RoIAlign of every box from its own level on the GPU: the table of RoIs, forward and backward.
#include "hkd/box_levels.h"
#include "roi_align/roi_gradients.cuh"

namespace hkd {
namespace {

// Cells that the bins of an axis may read, with a margin for the rounding of positions.
template <typename Acc>
__device__ void touched_cells(
    const AxisSamples<Acc>& axis, int bins, int length, int32_t* begin, int32_t* end) {
  constexpr Acc kEpsilon = sizeof(Acc) == sizeof(double) ? Acc(2e-16) : Acc(1e-7);
  const Acc other = axis.start + static_cast<Acc>(bins) * axis.bin;
  const Acc low = min(axis.start, other), high = max(axis.start, other);
  const Acc margin = 1 + 8 * kEpsilon * max(-low, high);
  *begin = *end = 0;
  if (axis.grid > 0 && high + margin >= -1 && low - margin <= static_cast<Acc>(length)) {
    const Acc last = high + margin + 1;
    *begin = low > margin ? static_cast<int32_t>(low - margin) : 0;
    *end = last < static_cast<Acc>(length) ? static_cast<int32_t>(max(last, Acc(0))) + 1 : length;
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    sample_boxes_kernel(const BoxLists lists, const Sampling sampling, const Rois rois) {
  const int64_t row = lists.first_row[0] + int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= lists.first_row[lists.count]) {
    return;
  }
  int list = 0;
  while (row >= lists.first_row[list + 1]) {
    ++list;
  }
  const Numbers boxes{
      const_cast<void*>(lists.boxes[list]),
      lists.is_double[list] ? Storage::kDouble : Storage::kFloat};
  Acc sides[4];
  float level_sides[4];
  load(boxes, (row - lists.first_row[list]) * 4, 4, false, sides);
  load(boxes, (row - lists.first_row[list]) * 4, 4, false, level_sides);
  SampledRoi<Acc> roi;
  roi.image = lists.first_image + list;
  roi.level = box_level(
      level_sides[0],
      level_sides[1],
      level_sides[2],
      level_sides[3],
      sampling.log2_strides,
      sampling.levels);
  const Acc scale = static_cast<Acc>(sampling.cells_per_pixel[roi.level]);
  const int ratio = sampling.sampling_ratio;
  roi.rows = axis_samples(sides[1], sides[3], scale, sampling.rows, ratio);
  roi.columns = axis_samples(sides[0], sides[2], scale, sampling.columns, ratio);
  static_cast<SampledRoi<Acc>*>(rois.rois)[row] = roi;
  if (rois.touched != nullptr) {
    CellRange range;
    touched_cells(roi.rows, sampling.rows, sampling.heights[roi.level], &range.top, &range.bottom);
    touched_cells(
        roi.columns, sampling.columns, sampling.widths[roi.level], &range.left, &range.right);
    rois.touched[row] = range;
  }
}

// One block a group: counts the RoIs of the groups before, then puts its own in order.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) group_rois_kernel(
    const Rois rois, int64_t images, int64_t begin, int64_t end, const RoiGroups groups) {
  const auto group_of = [&](int64_t row) {
    const SampledRoi<Acc>& roi = static_cast<const SampledRoi<Acc>*>(rois.rois)[row];
    return roi.level * images + roi.image;
  };
  const int64_t group = blockIdx.x;
  int before[1] = {};
  for (int64_t row = begin + threadIdx.x; row < end; row += kThreads) {
    before[0] += group_of(row) < group ? 1 : 0;
  }
  block_sums<kThreads>(before);
  int place = before[0];
  if (threadIdx.x == 0) {
    groups.starts[group] = place;
    if (group == gridDim.x - 1) {
      groups.starts[group + 1] = static_cast<int32_t>(end - begin);
    }
  }
  for (int64_t first = begin; first < end; first += kThreads) {
    const int64_t row = first + threadIdx.x;
    const bool own = row < end && group_of(row) == group;
    int count;
    const int offset = place_among_hits(own, &count);
    if (own) {
      groups.touched[place + offset] = rois.touched[row];
      groups.rows[place + offset] = static_cast<int32_t>(row);
    }
    place += count;
  }
}

// One block a RoI, tile of bins and step of channels.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kRoiBlocksAtOnce<Acc>) roi_align_kernel(
    const RoiPyramid pyramid,
    const Sampling sampling,
    const Rois rois,
    int64_t begin,
    const Bins bins) {
  __shared__ BinTile<Acc> tile;
  const TileOfBlock block(sampling, pyramid.channels);
  const SampledRoi<Acc> roi = static_cast<const SampledRoi<Acc>*>(rois.rois)[begin + block.roi];
  pool<kPack<Acc>>(
      roi, sampling, pyramid.maps[roi.level], pyramid.channels, block.range, Acc(1), true, tile);
  __syncthreads();
  const TileRange& range = block.range;
  for_each_number<4>(range, bins.channel_stride == 1, [&](int row, int column, int channel) {
    const int64_t bin = int64_t(range.row + row) * sampling.columns + range.column + column;
    store(
        bins.numbers,
        block.roi * bins.channels * sampling.bins() + bin * bins.bin_stride +
            (range.channel + channel) * bins.channel_stride,
        *tile.at(row, column, channel));
  });
}

// Gradients of the bins of a row, which is counted from `begin`, into a tile.
template <typename Acc>
__device__ __forceinline__ void load_bins(
    const Bins& upstream,
    const Sampling& sampling,
    int64_t row,
    const TileRange& range,
    BinTile<Acc>& tile) {
  const int64_t first = row * upstream.channels * sampling.bins();
  for_each_number<4>(range, upstream.channel_stride == 1, [&](int row, int column, int channel) {
    const int64_t bin = int64_t(range.row + row) * sampling.columns + range.column + column;
    *tile.at(row, column, channel) = load<Acc>(
        upstream.numbers,
        first + bin * upstream.bin_stride + (range.channel + channel) * upstream.channel_stride);
  });
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads, kRoiBlocksAtOnce<Acc>) roi_align_backward_kernel(
    const RoiGradients gradients,
    const Sampling sampling,
    const Rois rois,
    const RoiGroups groups,
    const Bins upstream,
    int64_t begin) {
  gather_gradient<Acc>(
      gradients,
      sampling,
      rois,
      groups,
      [&](int64_t row, const SampledRoi<Acc>&, const TileRange& range, BinTile<Acc>& tile) {
        load_bins(upstream, sampling, row - begin, range, tile);
      });
}

// One block a RoI, tile of bins and step of channels.
__global__ void __launch_bounds__(kThreads, kRoiBlocksAtOnce<float>) roi_align_scatter_kernel(
    const RoiPyramid gradients,
    uint32_t levels,
    const Sampling sampling,
    const Rois rois,
    const Bins upstream,
    int64_t begin) {
  scatter_gradient(
      gradients,
      levels,
      sampling,
      rois,
      begin,
      [&](int64_t row, const SampledRoi<float>&, const TileRange& range, BinTile<float>& tile) {
        load_bins(upstream, sampling, row - begin, range, tile);
      });
}

} // namespace

int64_t sampled_roi_bytes(bool is_double) {
  return is_double ? sizeof(SampledRoi<double>) : sizeof(SampledRoi<float>);
}

void sample_boxes(
    const BoxLists& lists,
    const Sampling& sampling,
    const Rois& rois,
    bool is_double,
    cudaStream_t stream) {
  const int64_t rows = lists.first_row[lists.count] - lists.first_row[0];
  dispatch_accumulate(is_double, [&](auto acc) {
    HKD_LAUNCH(
        sample_boxes_kernel<decltype(acc)>,
        (rows + kThreads - 1) / kThreads,
        kThreads,
        0,
        stream,
        lists,
        sampling,
        rois);
  });
}

void group_rois(
    const Rois& rois,
    const Sampling& sampling,
    int64_t begin,
    int64_t end,
    const RoiGroups& groups,
    bool is_double,
    cudaStream_t stream) {
  dispatch_accumulate(is_double, [&](auto acc) {
    HKD_LAUNCH(
        group_rois_kernel<decltype(acc)>,
        sampling.levels * sampling.images,
        kThreads,
        0,
        stream,
        rois,
        sampling.images,
        begin,
        end,
        groups);
  });
}

void roi_align(
    const RoiPyramid& pyramid,
    const Sampling& sampling,
    const Rois& rois,
    int64_t begin,
    int64_t end,
    const Bins& bins,
    bool is_double,
    cudaStream_t stream) {
  dispatch_accumulate(is_double, [&](auto acc) {
    HKD_LAUNCH(
        roi_align_kernel<decltype(acc)>,
        (end - begin) * TileOfBlock::count(sampling, pyramid.channels),
        kThreads,
        0,
        stream,
        pyramid,
        sampling,
        rois,
        begin,
        bins);
  });
}

void set_gradient_blocks(const Sampling& sampling, const bool* takes, RoiGradients* gradients) {
  const int64_t steps = TileOfBlock::steps(gradients->pyramid.channels);
  gradients->blocks = 0;
  for (int level = 0; level < sampling.levels; ++level) {
    gradients->first_block[level] = static_cast<int32_t>(gradients->blocks);
    if (takes[level]) {
      const int64_t down = (sampling.heights[level] + kCellRows - 1) / kCellRows;
      const int64_t across = (sampling.widths[level] + kCellColumns - 1) / kCellColumns;
      gradients->blocks += sampling.images * down * across * steps;
    }
  }
}

void roi_align_backward(
    const RoiGradients& gradients,
    const Sampling& sampling,
    const Rois& rois,
    const RoiGroups& groups,
    const Bins& upstream,
    int64_t begin,
    bool is_double,
    cudaStream_t stream) {
  dispatch_accumulate(is_double, [&](auto acc) {
    HKD_LAUNCH(
        roi_align_backward_kernel<decltype(acc)>,
        gradients.blocks,
        kThreads,
        0,
        stream,
        gradients,
        sampling,
        rois,
        groups,
        upstream,
        begin);
  });
}

void roi_align_scatter(
    const RoiPyramid& gradients,
    uint32_t levels,
    const Sampling& sampling,
    const Rois& rois,
    const Bins& upstream,
    int64_t begin,
    int64_t end,
    cudaStream_t stream) {
  HKD_LAUNCH(
      roi_align_scatter_kernel,
      (end - begin) * TileOfBlock::count(sampling, gradients.channels),
      kThreads,
      0,
      stream,
      gradients,
      levels,
      sampling,
      rois,
      upstream,
      begin);
}

} // namespace hkd
