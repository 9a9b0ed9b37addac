// RoI distillation on the GPU: distances of differences and of rows, the adapter, and gradients.
#include "roi_align/roi_gradients.cuh"
#include "roi_distillation/roi_distillation_kernels.h"

namespace hkd {
namespace {

constexpr int kRowsOfBlock = 64; // of the rows route

template <typename Acc>
__device__ __forceinline__ Acc distance_of(Distance kind, Acc difference) {
  Acc value;
  if (kind == Distance::kMse) {
    element_distance<Distance::kMse>(difference, value);
  } else if (kind == Distance::kL1) {
    element_distance<Distance::kL1>(difference, value);
  } else {
    element_distance<Distance::kSmoothL1>(difference, value);
  }
  return value;
}

template <typename Acc>
__device__ __forceinline__ Acc slope_of(Distance kind, Acc difference) {
  return kind == Distance::kMse  ? element_slope<Distance::kMse>(difference)
         : kind == Distance::kL1 ? element_slope<Distance::kL1>(difference)
                                 : element_slope<Distance::kSmoothL1>(difference);
}

template <typename Acc>
__device__ __forceinline__ Acc load(const RoiLossScale& scale) {
  return *static_cast<const Acc*>(scale.grad) / static_cast<Acc>(scale.normalizer);
}

template <typename Acc>
__device__ __forceinline__ const SampledRoi<Acc>& roi_at(const Rois& rois, int64_t row) {
  return static_cast<const SampledRoi<Acc>*>(rois.rois)[row];
}

template <typename Acc>
__device__ __forceinline__ void leave_sum(Acc sum, Acc* pairs) {
  Acc sums[1] = {sum};
  block_sums<kThreads>(sums);
  if (threadIdx.x == 0) {
    pairs[2 * int64_t(blockIdx.x)] = sums[0];
    pairs[2 * int64_t(blockIdx.x) + 1] = 0;
  }
}

// ------------------------------------------------------------------------- difference
// Pools the student less the teacher.
template <int kCount, typename Acc>
__device__ __forceinline__ void pool_difference(
    const RoiPyramid& student,
    const RoiPyramid& teacher,
    const SampledRoi<Acc>& roi,
    const Sampling& sampling,
    const TileRange& range,
    BinTile<Acc>& tile) {
#pragma unroll 1 // one copy of what is long
  for (int side = 0; side < 2; ++side) {
    const RoiPyramid& maps = side == 0 ? student : teacher;
    pool<kCount>(
        roi,
        sampling,
        maps.maps[roi.level],
        maps.channels,
        range,
        side == 0 ? Acc(1) : Acc(-1),
        side == 0,
        tile);
  }
}

// Differences in a tile become `scale` times the slope of their distance.
template <int kAtOnce, typename Acc>
__device__ __forceinline__ void differentiate(
    Distance distance, Acc scale, const TileRange& range, BinTile<Acc>& tile) {
  for_each_number<kAtOnce>(range, true, [&](int row, int column, int channel) {
    Acc* value = tile.at(row, column, channel);
    *value = scale * slope_of(distance, *value);
  });
}

// One block a RoI, tile of bins and step of channels.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kRoiBlocksAtOnce<Acc>) roi_difference_kernel(
    const RoiPyramid student,
    const RoiPyramid teacher,
    const Sampling sampling,
    const Rois rois,
    const RoiComparison comparison,
    Acc* pairs) {
  __shared__ BinTile<Acc> tile;
  const TileOfBlock block(sampling, student.channels);
  const SampledRoi<Acc> roi = roi_at<Acc>(rois, block.roi);
  Acc sum = 0;
  if (comparison.by_difference(roi.level)) {
    pool_difference<kPack<Acc>>(student, teacher, roi, sampling, block.range, tile);
    __syncthreads();
    for_each_number<4>(block.range, true, [&](int row, int column, int channel) {
      sum += distance_of(comparison.distance, *tile.at(row, column, channel));
    });
  }
  leave_sum(sum, pairs);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads, kRoiBlocksAtOnce<Acc>) roi_difference_backward_kernel(
    const RoiGradients gradients,
    const RoiPyramid student,
    const RoiPyramid teacher,
    const Sampling sampling,
    const Rois rois,
    const RoiGroups groups,
    const RoiComparison comparison,
    const RoiLossScale loss_scale) {
  gather_gradient<Acc>(
      gradients,
      sampling,
      rois,
      groups,
      [&](int64_t, const SampledRoi<Acc>& roi, const TileRange& range, BinTile<Acc>& tile) {
        // Half a pack: the gradient's sums take the registers.
        pool_difference<kPack<Acc> / 2>(student, teacher, roi, sampling, range, tile);
        __syncthreads();
        differentiate<1>(comparison.distance, load<Acc>(loss_scale), range, tile);
      });
}

// One block a RoI, tile of bins and step of channels.
__global__ void __launch_bounds__(kThreads, kRoiBlocksAtOnce<float>) roi_difference_scatter_kernel(
    const RoiPyramid gradients,
    const RoiPyramid student,
    const RoiPyramid teacher,
    const Sampling sampling,
    const Rois rois,
    const RoiComparison comparison,
    const RoiLossScale loss_scale) {
  scatter_gradient(
      gradients,
      comparison.difference_levels,
      sampling,
      rois,
      0,
      [&](int64_t, const SampledRoi<float>& roi, const TileRange& range, BinTile<float>& tile) {
        pool_difference<kPack<float>>(student, teacher, roi, sampling, range, tile);
        __syncthreads();
        differentiate<4>(comparison.distance, load<float>(loss_scale), range, tile);
      });
}

// ------------------------------------------------------------------------- rows
// A matrix product in tiles of 64 x 64, a block each: thread (y, x) has rows y, y + 16, ... and
// columns x, x + 16, ...
struct ProductTile {
  static constexpr int kSide = 64, kDepth = 16, kOfThread = 4, kStep = 16;

  template <typename Acc>
  struct Operands {
    Acc left[kDepth][kSide + 1], right[kDepth][kSide + 1];
  };

  // Calls body(place in depth, place in side, the value's address) for the numbers of an operand.
  // Threads are neighbours along the depth or along the side.
  template <typename Acc, typename Body>
  static __device__ __forceinline__ void fill(
      Acc (&operand)[kDepth][kSide + 1], bool along_depth, const Body& body) {
#pragma unroll
    for (int i = 0; i < kSide * kDepth / kThreads; ++i) {
      const int n = int(threadIdx.x) + i * kThreads;
      const int depth = along_depth ? n % kDepth : n / kSide;
      const int side = along_depth ? n / kDepth : n % kSide;
      operand[depth][side] = body(depth, side);
    }
  }

  template <typename Acc>
  static __device__ __forceinline__ void multiply(
      const Operands<Acc>& operands, Acc (&sums)[kOfThread][kOfThread]) {
    const int x = threadIdx.x % kStep, y = threadIdx.x / kStep;
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      Acc left[kOfThread], right[kOfThread];
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) {
        left[i] = operands.left[depth][y + i * kStep];
        right[i] = operands.right[depth][x + i * kStep];
      }
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) {
#pragma unroll
        for (int j = 0; j < kOfThread; ++j) {
          sums[i][j] += left[i] * right[j];
        }
      }
    }
  }

  // Calls body(row, column, i, j) for the numbers of a thread.
  template <typename Body>
  static __device__ __forceinline__ void for_each(const Body& body) {
    const int x = threadIdx.x % kStep, y = threadIdx.x / kStep;
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
#pragma unroll
      for (int j = 0; j < kOfThread; ++j) {
        body(y + i * kStep, x + j * kStep, i, j);
      }
    }
  }
};

// A block has up to 64 bins of one box, whose level says which adapter.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kRoiBlocksAtOnce<Acc>) roi_product_kernel(
    const Acc* rows,
    int64_t width_in,
    const RoiAdapters adapters,
    bool transposed,
    const Sampling sampling,
    const Rois rois,
    int64_t begin,
    Acc* out,
    int64_t width_out) {
  using Tile = ProductTile;
  __shared__ Tile::Operands<Acc> operands;
  const int bins = sampling.bins(), tiles = (bins + Tile::kSide - 1) / Tile::kSide;
  const int64_t box = blockIdx.x / tiles;
  const int bin = int(blockIdx.x % tiles) * Tile::kSide;
  const int count = min(Tile::kSide, bins - bin);
  const int64_t first = box * bins + bin, column = int64_t(blockIdx.y) * Tile::kSide;
  const int level = roi_at<Acc>(rois, begin + box).level;
  const Acc* weight = static_cast<const Acc*>(adapters.weights[level]);
  const Acc* bias = static_cast<const Acc*>(adapters.biases[level]);
  Acc sums[Tile::kOfThread][Tile::kOfThread] = {};
  for (int64_t depth = 0; weight != nullptr && depth < width_in; depth += Tile::kDepth) {
    __syncthreads(); // the operands before have been read
    Tile::fill(operands.left, true, [&](int k, int row) {
      return row < count && depth + k < width_in ? rows[(first + row) * width_in + depth + k]
                                                 : Acc(0);
    });
    Tile::fill(operands.right, !transposed, [&](int k, int n) {
      if (column + n >= width_out || depth + k >= width_in) {
        return Acc(0);
      }
      return transposed ? weight[(depth + k) * width_out + column + n]
                        : weight[(column + n) * width_in + depth + k];
    });
    __syncthreads();
    Tile::multiply(operands, sums);
  }
  Tile::for_each([&](int row, int n, int i, int j) {
    const int64_t at = column + n;
    if (row < count && at < width_out) {
      Acc value = sums[i][j];
      if (weight == nullptr) {
        value = rows[(first + row) * width_in + at];
      } else if (bias != nullptr && !transposed) {
        value += bias[at];
      }
      out[(first + row) * width_out + at] = value;
    }
  });
}

// Calls body(row of the buffers) for the rows of a block that are compared here, a warp each.
template <typename Acc, typename Body>
__device__ __forceinline__ void for_each_row(
    const Sampling& sampling,
    const Rois& rois,
    const RoiRows& range,
    const RoiComparison& comparison,
    const Body& body) {
  for (int i = threadIdx.x / 32; i < kRowsOfBlock; i += kThreads / 32) {
    const int64_t row = int64_t(blockIdx.x) * kRowsOfBlock + i;
    if (row < range.count * sampling.bins() &&
        !comparison.by_difference(roi_at<Acc>(rois, range.begin + row / sampling.bins()).level)) {
      body(row);
    }
  }
}

template <typename Acc>
__device__ __forceinline__ CosineCell<Acc> cosine_of(const Acc* s, const Acc* t, int64_t width) {
  Acc st = 0, ss = 0, tt = 0;
  for (int64_t c = threadIdx.x % 32; c < width; c += 32) {
    st += s[c] * t[c];
    ss += s[c] * s[c];
    tt += t[c] * t[c];
  }
  return cosine_cell(lane_sum(st), lane_sum(ss), lane_sum(tt));
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads, kRoiBlocksAtOnce<Acc>) roi_rows_kernel(
    const Acc* student,
    const Acc* teacher,
    int64_t width,
    const Sampling sampling,
    const Rois rois,
    const RoiRows range,
    const RoiComparison comparison,
    Acc* pairs) {
  const int lane = threadIdx.x % 32;
  Acc sum = 0;
  for_each_row<Acc>(sampling, rois, range, comparison, [&](int64_t row) {
    const Acc *s = student + row * width, *t = teacher + row * width;
    if (comparison.distance == Distance::kCosine) {
      const Acc distance = cosine_of(s, t, width).distance;
      sum += lane == 0 ? distance : Acc(0);
    } else {
      for (int64_t c = lane; c < width; c += 32) {
        sum += distance_of(comparison.distance, s[c] - t[c]);
      }
    }
  });
  leave_sum(sum, pairs);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads, kRoiBlocksAtOnce<Acc>) roi_rows_backward_kernel(
    Acc* student,
    const Acc* teacher,
    int64_t width,
    const Sampling sampling,
    const Rois rois,
    const RoiRows range,
    const RoiComparison comparison,
    const RoiLossScale loss_scale) {
  const int lane = threadIdx.x % 32;
  const Acc scale = load<Acc>(loss_scale);
  for_each_row<Acc>(sampling, rois, range, comparison, [&](int64_t row) {
    Acc* s = student + row * width;
    const Acc* t = teacher + row * width;
    if (comparison.distance == Distance::kCosine) {
      const CosineCell<Acc> cell = cosine_of<Acc>(s, t, width);
      for (int64_t c = lane; c < width; c += 32) {
        s[c] = scale * (cell.student * s[c] + cell.teacher * t[c]);
      }
    } else {
      for (int64_t c = lane; c < width; c += 32) {
        s[c] = scale * slope_of(comparison.distance, s[c] - t[c]);
      }
    }
  });
}

constexpr int kBoxesOfSlice = 32;

// One block a slice of the boxes and a tile of the weight.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kRoiBlocksAtOnce<Acc>) adapter_gradient_kernel(
    const Acc* gradients,
    int64_t width_out,
    const Acc* inputs,
    int64_t width_in,
    uint32_t levels,
    int bins,
    const Rois rois,
    const RoiRows range,
    Acc* partial) {
  using Tile = ProductTile;
  __shared__ Tile::Operands<Acc> operands;
  const int64_t across = (width_in + Tile::kSide - 1) / Tile::kSide;
  const int64_t out = blockIdx.x / across * Tile::kSide, in = blockIdx.x % across * Tile::kSide;
  const int64_t begin = int64_t(blockIdx.y) * kBoxesOfSlice;
  const int64_t end = min(begin + kBoxesOfSlice, range.count);
  Acc sums[Tile::kOfThread][Tile::kOfThread] = {};
  for (int64_t box = begin; box < end; ++box) {
    if (!(levels >> roi_at<Acc>(rois, range.begin + box).level & 1)) {
      continue;
    }
    for (int bin = 0; bin < bins; bin += Tile::kDepth) {
      const int64_t row = box * bins + bin;
      __syncthreads(); // the operands before have been read
      Tile::fill(operands.left, false, [&](int k, int c) {
        return bin + k < bins && out + c < width_out ? gradients[(row + k) * width_out + out + c]
                                                     : Acc(0);
      });
      Tile::fill(operands.right, false, [&](int k, int c) {
        return bin + k < bins && in + c < width_in ? inputs[(row + k) * width_in + in + c] : Acc(0);
      });
      __syncthreads();
      Tile::multiply(operands, sums);
    }
  }
  Acc* own = partial + int64_t(blockIdx.y) * width_out * width_in;
  Tile::for_each([&](int y, int x, int i, int j) {
    if (out + y < width_out && in + x < width_in) {
      own[(out + y) * width_in + in + x] = sums[i][j];
    }
  });
}

// One block a slice of the boxes and 32 channels; its warps share the rows.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) bias_gradient_kernel(
    const Acc* gradients,
    int64_t width,
    uint32_t levels,
    int bins,
    const Rois rois,
    const RoiRows range,
    double* partial) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t channel = int64_t(blockIdx.x) * 32 + lane;
  const int64_t begin = int64_t(blockIdx.y) * kBoxesOfSlice;
  const int64_t end = min(begin + kBoxesOfSlice, range.count);
  double sum = 0;
  for (int64_t box = begin; box < end && channel < width; ++box) {
    if (levels >> roi_at<Acc>(rois, range.begin + box).level & 1) {
      for (int bin = warp; bin < bins; bin += kWarps) {
        sum += gradients[(box * bins + bin) * width + channel];
      }
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && channel < width) {
    for (int w = 1; w < kWarps; ++w) {
      sum += sums[w][lane];
    }
    partial[blockIdx.y * width + channel] = sum;
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    add_slices_kernel(const Acc* partial, int64_t slices, int64_t size, bool first, Acc* total) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < size) {
    Acc sum = first ? Acc(0) : total[i];
    for (int64_t slice = 0; slice < slices; ++slice) {
      sum += partial[slice * size + i];
    }
    total[i] = sum;
  }
}

int64_t quotient_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

} // namespace

int64_t roi_difference_blocks(const Sampling& sampling, int64_t channels, int64_t rois) {
  return rois * TileOfBlock::count(sampling, channels);
}

void roi_difference(
    const RoiPyramid& student,
    const RoiPyramid& teacher,
    const Sampling& sampling,
    const Rois& rois,
    const RoiComparison& comparison,
    void* pairs,
    bool is_double,
    cudaStream_t stream) {
  dispatch_accumulate(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    HKD_LAUNCH(
        roi_difference_kernel<Acc>,
        roi_difference_blocks(sampling, student.channels, rois.count),
        kThreads,
        0,
        stream,
        student,
        teacher,
        sampling,
        rois,
        comparison,
        static_cast<Acc*>(pairs));
  });
}

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
    cudaStream_t stream) {
  dispatch_accumulate(is_double, [&](auto acc) {
    HKD_LAUNCH(
        roi_difference_backward_kernel<decltype(acc)>,
        gradients.blocks,
        kThreads,
        0,
        stream,
        gradients,
        student,
        teacher,
        sampling,
        rois,
        groups,
        comparison,
        scale);
  });
}

void roi_difference_scatter(
    const RoiPyramid& gradients,
    const RoiPyramid& student,
    const RoiPyramid& teacher,
    const Sampling& sampling,
    const Rois& rois,
    const RoiComparison& comparison,
    const RoiLossScale& scale,
    cudaStream_t stream) {
  HKD_LAUNCH(
      roi_difference_scatter_kernel,
      roi_difference_blocks(sampling, student.channels, rois.count),
      kThreads,
      0,
      stream,
      gradients,
      student,
      teacher,
      sampling,
      rois,
      comparison,
      scale);
}

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
    cudaStream_t stream) {
  const dim3 grid(
      static_cast<unsigned>(range.count * quotient_up(sampling.bins(), ProductTile::kSide)),
      static_cast<unsigned>(quotient_up(width_out, ProductTile::kSide)));
  dispatch_accumulate(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    HKD_LAUNCH(
        roi_product_kernel<Acc>,
        grid,
        kThreads,
        0,
        stream,
        static_cast<const Acc*>(rows),
        width_in,
        adapters,
        transposed,
        sampling,
        rois,
        range.begin,
        static_cast<Acc*>(out),
        width_out);
  });
}

int64_t roi_rows_blocks(const Sampling& sampling, int64_t rois) {
  return quotient_up(rois * sampling.bins(), kRowsOfBlock);
}

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
    cudaStream_t stream) {
  dispatch_accumulate(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    HKD_LAUNCH(
        roi_rows_kernel<Acc>,
        roi_rows_blocks(sampling, range.count),
        kThreads,
        0,
        stream,
        static_cast<const Acc*>(student),
        static_cast<const Acc*>(teacher),
        width,
        sampling,
        rois,
        range,
        comparison,
        static_cast<Acc*>(pairs));
  });
}

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
    cudaStream_t stream) {
  dispatch_accumulate(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    HKD_LAUNCH(
        roi_rows_backward_kernel<Acc>,
        roi_rows_blocks(sampling, range.count),
        kThreads,
        0,
        stream,
        static_cast<Acc*>(student),
        static_cast<const Acc*>(teacher),
        width,
        sampling,
        rois,
        range,
        comparison,
        scale);
  });
}

int64_t adapter_gradient_slices(int64_t rois) {
  return quotient_up(rois, kBoxesOfSlice);
}

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
    cudaStream_t stream) {
  constexpr int kSide = ProductTile::kSide;
  const dim3 grid(
      static_cast<unsigned>(quotient_up(width_out, kSide) * quotient_up(width_in, kSide)),
      static_cast<unsigned>(adapter_gradient_slices(range.count)));
  dispatch_accumulate(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    HKD_LAUNCH(
        adapter_gradient_kernel<Acc>,
        grid,
        kThreads,
        0,
        stream,
        static_cast<const Acc*>(gradients),
        width_out,
        static_cast<const Acc*>(inputs),
        width_in,
        levels,
        sampling.bins(),
        rois,
        range,
        static_cast<Acc*>(partial));
  });
}

void bias_gradient(
    const void* gradients,
    int64_t width,
    uint32_t levels,
    const Sampling& sampling,
    const Rois& rois,
    const RoiRows& range,
    double* partial,
    bool is_double,
    cudaStream_t stream) {
  const dim3 grid(
      static_cast<unsigned>(quotient_up(width, 32)),
      static_cast<unsigned>(adapter_gradient_slices(range.count)));
  dispatch_accumulate(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    HKD_LAUNCH(
        bias_gradient_kernel<Acc>,
        grid,
        kThreads,
        0,
        stream,
        static_cast<const Acc*>(gradients),
        width,
        levels,
        sampling.bins(),
        rois,
        range,
        partial);
  });
}

void add_slices(
    const void* partial,
    int64_t slices,
    int64_t size,
    bool first,
    void* total,
    bool is_double,
    cudaStream_t stream) {
  dispatch_accumulate(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    HKD_LAUNCH(
        add_slices_kernel<Acc>,
        quotient_up(size, kThreads),
        kThreads,
        0,
        stream,
        static_cast<const Acc*>(partial),
        slices,
        size,
        first,
        static_cast<Acc*>(total));
  });
}

} // namespace hkd
