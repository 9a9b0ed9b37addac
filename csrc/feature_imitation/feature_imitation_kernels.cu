// Distances of two feature pyramids and their gradients on the GPU, for levels without an adapter.
//
// A thread has a square of four neighbouring cells by four neighbouring channels in registers,
// which it reads by rows or by columns, as each side is stored: either way a pack of four at once.
// So one kernel serves NCHW, channels_last and one of each. The lanes of a warp lie along channels
// for channels_last, along cells for NCHW, in both directions for one of each (channel_lanes), and
// squares in which no cell counts are not read.
#include "feature_imitation/imitation_kernels.cuh"

namespace hkd {
namespace {

constexpr int kStripCells = 128;  // of a block that goes over all channels
constexpr int kMomentPasses = 16; // of a block that goes over some channels

__device__ __forceinline__ int limited(int64_t count) {
  return count < kSide ? static_cast<int>(count) : kSide;
}

// Where the squares of a thread begin in a strip, and how far apart they are. Warps share the
// strip's cells, and what is left of them its channels.
struct Squares {
  int cell_lanes, cell_warps;
  int cell, cell_step, channel, channel_step;

  __device__ __forceinline__ explicit Squares(int channel_lanes)
      : cell_lanes(32 / channel_lanes),
        cell_warps(channel_lanes < kWarps ? channel_lanes : kWarps) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    cell = kSide * (warp % cell_warps * cell_lanes + lane / channel_lanes);
    cell_step = kSide * cell_warps * cell_lanes;
    channel = kSide * (warp / cell_warps * channel_lanes + lane % channel_lanes);
    channel_step = kSide * (kWarps / cell_warps) * channel_lanes;
  }
};

// The strip of an image that a block takes.
struct Strip {
  int level;
  int64_t image, first; // cell

  __device__ __forceinline__ Strip(const ImitationLevels& table, const BlocksOfLevels& blocks)
      : level(blocks.level(blockIdx.x)) {
    const int64_t strips = (table.levels[level].cells + kStripCells - 1) / kStripCells;
    const int64_t local = blockIdx.x - blocks.first[level];
    image = local / strips;
    first = local % strips * kStripCells;
  }
};

// The four packs of a square as a map has them in memory: the channels of a cell, or the cells of a
// channel.
struct Packs {
  int64_t first, step; // places

  __device__ __forceinline__
  Packs(const StoredMap& map, int64_t cells, int64_t image, int64_t cell, int64_t channel)
      : first(
            map.channels_last ? (image * cells + cell) * map.channels + channel
                              : (image * map.channels + channel) * cells + cell),
        step(map.channels_last ? map.channels : cells) {
  }
};

template <typename Acc>
__device__ __forceinline__ void transpose_unless(bool condition, Acc (&square)[kSide][kSide]) {
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
#pragma unroll
    for (int k = 0; k < i; ++k) {
      const Acc below = square[i][k], above = square[k][i];
      square[i][k] = condition ? below : above;
      square[k][i] = condition ? above : below;
    }
  }
}

// square[cell][channel]. Of cells that are not `wanted` anything may come; what is beyond the
// channels is 0.
template <typename Acc>
__device__ __forceinline__ void load_square(
    const StoredMap& map,
    int64_t cells,
    int64_t image,
    int64_t cell,
    int64_t channel,
    unsigned wanted,
    Acc (&square)[kSide][kSide]) {
  const Packs packs(map, cells, image, cell, channel);
  const int channels = limited(map.channels - channel);
  const unsigned which = map.channels_last ? wanted : (1u << channels) - 1;
  const int count = map.channels_last ? channels : limited(cells - cell);
  as_stored(map.numbers, [&](const auto* data) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      load(data + packs.first + i * packs.step, which >> i & 1 ? count : 0, map.aligned, square[i]);
    }
  });
  transpose_unless(map.channels_last, square);
}

// Stores what lies on the map. The square is lost.
template <typename Acc>
__device__ __forceinline__ void store_square(
    const StoredMap& map,
    int64_t cells,
    int64_t image,
    int64_t cell,
    int64_t channel,
    Acc (&square)[kSide][kSide]) {
  const Packs packs(map, cells, image, cell, channel);
  const int channels = limited(map.channels - channel), neighbours = limited(cells - cell);
  const int which = map.channels_last ? neighbours : channels;
  const int count = map.channels_last ? channels : neighbours;
  transpose_unless(map.channels_last, square);
  as_stored(map.numbers, [&](auto* data) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      store(data + packs.first + i * packs.step, i < which ? count : 0, map.aligned, square[i]);
    }
  });
}

template <typename Acc>
__device__ __forceinline__ unsigned not_zero(const Acc (&values)[kSide]) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    bits |= values[i] != 0 ? 1u << i : 0u;
  }
  return bits;
}

// Products s.t, s.s and t.t of a strip's cells, which warps leave where they share channels.
template <typename Acc>
struct StripProducts {
  Acc sums[3][kWarps][kStripCells];

  __device__ __forceinline__ void leave(
      int channel_lanes, const Squares& squares, int cell, Acc (&own)[3][kSide]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int p = 0; p < 3; ++p) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        const Acc sum = lane_sum(own[p][i], channel_lanes);
        if (lane % channel_lanes == 0) {
          sums[p][warp / squares.cell_warps][cell + i] = sum;
        }
      }
    }
  }

  __device__ __forceinline__ Acc total(int p, const Squares& squares, int cell) const {
    Acc sum = 0;
    for (int w = 0; w < kWarps / squares.cell_warps; ++w) {
      sum += sums[p][w][cell];
    }
    return sum;
  }
};

template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) distance_kernel(
    const __grid_constant__ ImitationLevels table,
    const __grid_constant__ BlocksOfLevels blocks,
    Distance distance) {
  __shared__ StripProducts<Acc> products;
  const Strip strip(table, blocks);
  const ImitationLevel& level = table.levels[strip.level];
  const Squares squares(level.channel_lanes);
  const bool aligned = level.cells % kSide == 0;
  const bool cosine = distance == Distance::kCosine;
  const int64_t image_cells = strip.image * level.cells;

  Acc loss = 0;
  for (int at = squares.cell; at < kStripCells; at += squares.cell_step) {
    const int64_t cell = strip.first + at;
    Acc weights[kSide];
    load_cells(level.cell_weights, image_cells + cell, level.cells - cell, aligned, weights);
    const unsigned wanted = not_zero(weights);
    Acc own[3][kSide] = {};
    for (int64_t c = squares.channel; wanted != 0 && c < level.teacher.channels;
         c += squares.channel_step) {
      Acc s[kSide][kSide], t[kSide][kSide];
      load_square(level.student, level.cells, strip.image, cell, c, wanted, s);
      load_square(level.teacher, level.cells, strip.image, cell, c, wanted, t);
      if (cosine) {
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
#pragma unroll
          for (int k = 0; k < kSide; ++k) {
            own[0][i] += s[i][k] * t[i][k];
            own[1][i] += s[i][k] * s[i][k];
            own[2][i] += t[i][k] * t[i][k];
          }
        }
      } else {
        Acc of_channels[kSide];
        load_channel_weights(level, strip.image, c, of_channels);
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
          Acc sum = 0;
#pragma unroll
          for (int k = 0; k < kSide; ++k) {
            const Acc term = of_channels[k] * distance_of(distance, s[i][k] - t[i][k]);
            sum += of_channels[k] != 0 ? term : Acc(0);
          }
          loss += weights[i] != 0 ? weights[i] * sum : Acc(0);
        }
      }
    }
    if (cosine) {
      products.leave(level.channel_lanes, squares, at, own);
    }
  }
  if (cosine) {
    __syncthreads();
    const int64_t cell = strip.first + threadIdx.x;
    if (threadIdx.x < kStripCells && cell < level.cells) {
      const int64_t index = image_cells + cell;
      const Acc weight = level.cell_weights != nullptr
                             ? static_cast<const Acc*>(level.cell_weights)[index]
                             : Acc(1);
      CosineCell<Acc> of_cell{};
      if (weight != 0) {
        of_cell = cosine_cell(
            products.total(0, squares, threadIdx.x),
            products.total(1, squares, threadIdx.x),
            products.total(2, squares, threadIdx.x));
        loss = weight * of_cell.distance;
      }
      Acc* factors = static_cast<Acc*>(level.coefficients);
      factors[index] = weight * of_cell.student;
      factors[level.images * level.cells + index] = weight * of_cell.teacher;
    }
  }
  Acc sums[1] = {loss};
  block_sums<kThreads>(sums);
  if (threadIdx.x == 0) {
    static_cast<Acc*>(level.sums)[blockIdx.x - blocks.first[strip.level]] = sums[0];
  }
}

// Cells and channels of a block of moments: its warps all lie along cells.
HKD_HD int64_t cells_of_moments(const ImitationLevel& level) {
  return int64_t(kMomentPasses) * kWarps * kSide * (32 / level.channel_lanes);
}

HKD_HD int64_t channel_groups(const ImitationLevel& level) {
  const int64_t channels = kSide * level.channel_lanes;
  return (level.teacher.channels + channels - 1) / channels;
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) moments_kernel(
    const __grid_constant__ ImitationLevels table, const __grid_constant__ BlocksOfLevels blocks) {
  __shared__ PartialMoments<Acc> of_warps[kWarps][32];
  const int l = blocks.level(blockIdx.x);
  const ImitationLevel& level = table.levels[l];
  const int lanes = level.channel_lanes, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t groups = channel_groups(level), strip_cells = cells_of_moments(level);
  const int64_t strips = (level.cells + strip_cells - 1) / strip_cells;
  const int64_t local = blockIdx.x - blocks.first[l];
  const int64_t part = local / groups; // image and strip
  const int64_t first_channel = local % groups * kSide * lanes;
  const int64_t c = first_channel + kSide * (lane % lanes);

  MomentSums<Acc> sums;
  const int64_t step = kWarps * kSide * (32 / lanes);
  int64_t cell = part % strips * strip_cells + kSide * (warp * (32 / lanes) + lane / lanes);
  for (int pass = 0; pass < kMomentPasses; ++pass, cell += step) {
    if (cell < level.cells && c < level.teacher.channels) {
      const int64_t count = level.cells - cell;
      const unsigned wanted = count < kSide ? (1u << count) - 1 : kAllCells;
      Acc s[kSide][kSide], t[kSide][kSide];
      load_square(level.student, level.cells, part / strips, cell, c, wanted, s);
      load_square(level.teacher, level.cells, part / strips, cell, c, wanted, t);
      sums.add(s, t, count);
    }
  }
#pragma unroll
  for (int k = 0; k < kSide; ++k) {
    PartialMoments<Acc> own = sums.of_channel(k);
    for (int bits = 16; bits >= lanes; bits /= 2) {
      own.merge(own.of_lane(bits));
    }
    if (lane < lanes) {
      of_warps[warp][lane] = own;
    }
    __syncthreads();
    if (warp == 0 && lane < lanes && c + k < level.teacher.channels) {
      for (int w = 1; w < kWarps; ++w) {
        own.merge(of_warps[w][lane]);
      }
      static_cast<PartialMoments<Acc>*>(level.moments)[part * level.teacher.channels + c + k] = own;
    }
    __syncthreads();
  }
}

// A warp a channel.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) correlation_kernel(
    const __grid_constant__ ImitationLevels table, const __grid_constant__ BlocksOfLevels blocks) {
  const int l = blocks.level(blockIdx.x);
  const ImitationLevel& level = table.levels[l];
  const int64_t channels = level.teacher.channels;
  const int lane = threadIdx.x % 32;
  const int64_t c = (blockIdx.x - blocks.first[l]) * int64_t(kWarps) + threadIdx.x / 32;
  PartialMoments<double> all{};
  for (int64_t part = lane; c < channels && part < level.moment_parts; part += 32) {
    const auto given = static_cast<const PartialMoments<Acc>*>(level.moments)[part * channels + c];
    const Moments<Acc>& m = given.moments;
    all.merge({given.s_pivot, given.t_pivot, {m.count, m.s_mean, m.t_mean, m.ss, m.tt, m.st}});
  }
  for (int bits = 16; bits > 0; bits /= 2) {
    all.merge(all.of_lane(bits));
  }
  if (lane == 0 && c < channels) {
    const bool any = all.moments.count > 0;
    const PkdChannel<double> channel = any ? pkd_channel(all.moments) : PkdChannel<double>{};
    static_cast<Acc*>(level.sums)[c] = static_cast<Acc>(channel.loss);
    Acc* coefficients = static_cast<Acc*>(level.coefficients) + c;
    coefficients[0] = static_cast<Acc>(all.s_pivot + all.moments.s_mean);
    coefficients[channels] = static_cast<Acc>(all.t_pivot + all.moments.t_mean);
    coefficients[2 * channels] = static_cast<Acc>(channel.student);
    coefficients[3 * channels] = static_cast<Acc>(channel.teacher);
  }
}

// One block: its warps add up each level, and then a lane has a level.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) finish_imitation_kernel(
    const __grid_constant__ ImitationLevels table, const LossOfLevels result, Distance distance) {
  __shared__ double painted[kMaxLevels][kWarps], losses[kMaxLevels][kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int l = 0; l < table.count; ++l) {
    const ImitationLevel& level = table.levels[l];
    double of_weights = 0, of_losses = 0;
    for (int64_t i = threadIdx.x; i < level.painted_count; i += kThreads) {
      of_weights += level.painted[i];
    }
    for (int64_t i = threadIdx.x; i < level.sum_count; i += kThreads) {
      of_losses += static_cast<const Acc*>(level.sums)[i];
    }
    of_weights = lane_sum(of_weights);
    of_losses = lane_sum(of_losses);
    if (lane == 0) {
      painted[l][warp] = of_weights;
      losses[l][warp] = of_losses;
    }
  }
  __syncthreads();
  if (warp > 0) {
    return;
  }
  double loss = 0;
  if (lane < table.count) {
    const ImitationLevel& level = table.levels[lane];
    const double cells = static_cast<double>(level.images * level.cells);
    const double channels = static_cast<double>(level.teacher.channels);
    double weights = 0, sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      weights += painted[lane][w];
      sum += losses[lane][w];
    }
    double terms = level.painted_count > 0 ? weights : cells;
    if (distance == Distance::kPkd) {
      terms = cells > 0 ? 1 : 0;
    }
    terms *= distance == Distance::kCosine ? (channels > 0 ? 1 : 0) : channels;
    const double factor =
        result.level_weights.data != nullptr ? load<double>(result.level_weights, lane) : 1.0;
    // No active cell: 0.
    const double scale = terms > 0 ? factor / (table.count * terms) : 0.0;
    result.scales[lane] = scale;
    loss = scale * sum;
  }
  loss = lane_sum(loss);
  if (lane == 0) {
    *static_cast<Acc*>(result.loss) = static_cast<Acc>(loss);
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) gradient_kernel(
    const __grid_constant__ ImitationLevels table,
    const __grid_constant__ BlocksOfLevels blocks,
    const ImitationScale given,
    Distance distance) {
  const Strip strip(table, blocks);
  const ImitationLevel& level = table.levels[strip.level];
  const Squares squares(level.channel_lanes);
  const Acc scale =
      *static_cast<const Acc*>(given.grad) * static_cast<Acc>(given.scales[strip.level]);
  const StoredMap& student = level.student;
  const StoredMap gradient = {
      level.gradient, student.channels, student.channels_last, student.aligned};
  const bool cosine = distance == Distance::kCosine;
  const void* of_student = cosine ? level.coefficients : level.cell_weights;
  const int64_t all_cells = level.images * level.cells;
  const bool aligned = level.cells % kSide == 0;

  for (int at = squares.cell; at < kStripCells; at += squares.cell_step) {
    const int64_t cell = strip.first + at, count = level.cells - cell;
    if (count <= 0) {
      return;
    }
    // Weights of cells; kCosine: factors of student and teacher.
    const int64_t index = strip.image * level.cells + cell;
    Acc factors[kSide], of_teacher[kSide] = {};
    load_cells(of_student, index, count, aligned, factors);
    if (cosine) {
      load_cells(
          level.coefficients,
          all_cells + index,
          count,
          aligned && all_cells % kSide == 0,
          of_teacher);
    }
    const unsigned wanted = level.adapted ? 0 : not_zero(factors) | not_zero(of_teacher);
    for (int64_t c = squares.channel; c < student.channels; c += squares.channel_step) {
      Acc out[kSide][kSide] = {};
      if (wanted != 0) {
        Acc s[kSide][kSide], t[kSide][kSide];
        load_square(student, level.cells, strip.image, cell, c, wanted, s);
        load_square(level.teacher, level.cells, strip.image, cell, c, wanted, t);
        const ChannelFactors<Acc> of_channels(level, distance, strip.image, c);
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
#pragma unroll
          for (int k = 0; k < kSide; ++k) {
            out[i][k] =
                scale *
                gradient_of(distance, s[i][k], t[i][k], factors[i], of_teacher[i], of_channels, k);
          }
        }
      }
      store_square(gradient, level.cells, strip.image, cell, c, out);
    }
  }
}

// The largest power of two up to `most` that `squares` fill.
int64_t lanes_for(int64_t squares, int64_t most) {
  int64_t lanes = 1;
  while (2 * lanes <= most && 2 * lanes <= squares) {
    lanes *= 2;
  }
  return lanes;
}

int64_t strips(const ImitationLevel& level) {
  return level.images * divided_up(level.cells, kStripCells);
}

} // namespace

int64_t channel_lanes(const StoredMap& student, const StoredMap& teacher) {
  // Four lanes by eight read whole sectors of 32 bytes of both layouts, in all types.
  const int64_t most = student.channels_last && teacher.channels_last   ? 32
                       : student.channels_last || teacher.channels_last ? 4
                                                                        : 1;
  return lanes_for(divided_up(student.channels, kSide), most);
}

int64_t distance_sums(const ImitationLevel& level) {
  return level.teacher.channels > 0 ? strips(level) : 0;
}

int64_t moment_parts(const ImitationLevel& level) {
  return level.images * divided_up(level.cells, cells_of_moments(level));
}

void distances(
    const ImitationLevels& levels, Distance distance, bool is_double, cudaStream_t stream) {
  const bool pkd = distance == Distance::kPkd;
  const BlocksOfLevels blocks = blocks_of_levels(levels, [&](const ImitationLevel& level) {
    return level.adapted ? 0
           : pkd         ? moment_parts(level) * channel_groups(level)
                         : distance_sums(level);
  });
  if (blocks.total() == 0) {
    return;
  }
  dispatch_loss_type(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    if (pkd) {
      HKD_LAUNCH(moments_kernel<Acc>, blocks.total(), kThreads, 0, stream, levels, blocks);
    } else {
      HKD_LAUNCH(
          distance_kernel<Acc>, blocks.total(), kThreads, 0, stream, levels, blocks, distance);
    }
  });
}

void correlate(const ImitationLevels& levels, bool is_double, cudaStream_t stream) {
  const BlocksOfLevels blocks = blocks_of_levels(levels, [](const ImitationLevel& level) {
    return divided_up(level.teacher.channels, kWarps);
  });
  if (blocks.total() > 0) {
    dispatch_loss_type(is_double, [&](auto acc) {
      HKD_LAUNCH(
          correlation_kernel<decltype(acc)>, blocks.total(), kThreads, 0, stream, levels, blocks);
    });
  }
}

void finish_imitation(
    const ImitationLevels& levels,
    const LossOfLevels& loss,
    Distance distance,
    bool is_double,
    cudaStream_t stream) {
  dispatch_loss_type(is_double, [&](auto acc) {
    HKD_LAUNCH(
        finish_imitation_kernel<decltype(acc)>, 1, kThreads, 0, stream, levels, loss, distance);
  });
}

void gradients(
    const ImitationLevels& levels,
    const ImitationScale& scale,
    Distance distance,
    bool is_double,
    cudaStream_t stream) {
  const BlocksOfLevels blocks = blocks_of_levels(levels, [](const ImitationLevel& level) {
    // Adapted cells are written later; if that is all of them, there is nothing to do here.
    const bool all_later = level.adapted && level.active.cells == nullptr;
    return level.student.channels > 0 && !all_later ? strips(level) : 0;
  });
  if (blocks.total() > 0) {
    dispatch_loss_type(is_double, [&](auto acc) {
      using Acc = decltype(acc);
      HKD_LAUNCH(
          gradient_kernel<Acc>,
          blocks.total(),
          kThreads,
          0,
          stream,
          levels,
          blocks,
          scale,
          distance);
    });
  }
}

} // namespace hkd
