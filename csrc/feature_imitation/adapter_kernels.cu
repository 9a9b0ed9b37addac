// Levels whose student goes through a 1x1 adapter before it is compared, on the GPU.
//
// Only active cells are adapted. They are the rows of a matrix (CellList), of which a block
// takes 64 by 64 channels, sixteen steps of the depth at a time in shared memory; a thread has a
// square of four by four. Products are taken in float32 (float64) by the ordinary units. Rows are
// gathered from the maps as they are stored, and no adapted map exists: forward needs sums alone,
// and backward takes so many rows at a time.
#include "feature_imitation/imitation_kernels.cuh"

namespace hkd {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kPitch = kTile + kSide; // so that lanes that write columns meet in few banks
constexpr int kGroups = kTile / kSide;
constexpr int kFetched = kTile * kDepth / kThreads;
constexpr int kMomentTiles = 8;           // of a block of moments
constexpr int64_t kTilesAtOnce = 1 << 10; // whose gradients exist at a time
constexpr int64_t kMostSplits = 16;       // of the sum over rows that is an adapter's gradient
constexpr int kMaxAdapters = 32;          // of one launch

// The rows of a tile, in shared memory: places of the first channel in both maps, and the cell over
// the images; -1 where there is no row.
struct Rows {
  int64_t student[kTile], teacher[kTile];
  int32_t cell[kTile];
};

__device__ __forceinline__ int64_t count_of_rows(const ImitationLevel& level) {
  return level.active.length != nullptr ? *level.active.length : level.images * level.cells;
}

__device__ __forceinline__ int64_t place_of(const StoredMap& map, int64_t cells, int64_t cell) {
  return map.channels_last ? cell * map.channels
                           : cell / cells * cells * map.channels + cell % cells;
}

__device__ __forceinline__ int64_t channel_step(const StoredMap& map, int64_t cells) {
  return map.channels_last ? 1 : cells;
}

__device__ __forceinline__ void load_rows(
    const ImitationLevel& level, int64_t first, int64_t count, Rows& rows) {
  if (threadIdx.x < kTile) {
    const int64_t row = first + threadIdx.x;
    int64_t cell = -1;
    if (row < count) {
      cell = level.active.cells != nullptr ? level.active.cells[row] : row;
    }
    rows.cell[threadIdx.x] = static_cast<int32_t>(cell);
    rows.student[threadIdx.x] = cell < 0 ? -1 : place_of(level.student, level.cells, cell);
    rows.teacher[threadIdx.x] = cell < 0 ? -1 : place_of(level.teacher, level.cells, cell);
  }
}

// The square of a tile that a thread has. Neighbouring lanes lie along rows where those are
// neighbours in memory, along columns otherwise.
struct Square {
  int row, column;

  __device__ __forceinline__ explicit Square(bool lanes_along_rows)
      : row(kSide * int(lanes_along_rows ? threadIdx.x % kGroups : threadIdx.x / kGroups)),
        column(kSide * int(lanes_along_rows ? threadIdx.x / kGroups : threadIdx.x % kGroups)) {
  }
};

// A matrix that products read: its lines are the rows of the product, or its columns. T is the type
// of its numbers, void where that is known at run time.
template <typename T>
struct Operand {
  Numbers numbers;
  const int64_t* places; // shared memory: where a line begins, or with `of_steps` a step; or null
  bool of_steps;
  int32_t first_line, lines; // `lines` are all of the matrix
  int64_t line_step, depth_step;

  // Whether neighbours in memory lie along the depth.
  __device__ __forceinline__ bool along_depth() const {
    return of_steps ? line_step != 1 : depth_step == 1;
  }

  __device__ __forceinline__ int64_t index(int line, int32_t step) const {
    if (places != nullptr && !of_steps) {
      return places[line] < 0 ? -1 : places[line] + step * depth_step;
    }
    if (first_line + line >= lines) {
      return -1;
    }
    const int64_t place = (first_line + line) * line_step;
    if (places == nullptr) {
      return place + step * depth_step;
    }
    return places[step] < 0 ? -1 : places[step] + place;
  }

  // Calls body(j, line, step) for the numbers that the thread fetches.
  template <typename Body>
  __device__ __forceinline__ void for_each_fetched(const Body& body) const {
    const bool along = along_depth();
#pragma unroll
    for (int j = 0; j < kFetched; ++j) {
      const int i = int(threadIdx.x) + j * kThreads;
      body(j, along ? i / kDepth : i % kTile, along ? i % kDepth : i / kTile);
    }
  }

  template <typename Acc>
  __device__ __forceinline__ void fetch(int32_t at, int32_t depth, Acc (&fetched)[kFetched]) const {
    const auto fetch_from = [&](const auto* data) {
      for_each_fetched([&](int j, int line, int step) {
        const int64_t place = at + step < depth ? index(line, at + step) : -1;
        fetched[j] = place < 0 ? Acc(0) : static_cast<Acc>(data[place]);
      });
    };
    if constexpr (std::is_void_v<T>) {
      as_stored(numbers, fetch_from);
    } else {
      fetch_from(static_cast<const T*>(numbers.data));
    }
  }
};

template <typename Acc>
struct Tiles {
  alignas(16) Acc rows[kDepth][kPitch], columns[kDepth][kPitch];
};

// Adds to the thread's square of sums[row][column] the products over `depth` steps. What is
// fetched for the next steps is on its way while these are multiplied.
template <typename Acc, typename R, typename C>
__device__ __forceinline__ void multiply(
    const Operand<R>& rows,
    const Operand<C>& columns,
    int32_t depth,
    const Square& square,
    Tiles<Acc>& tiles,
    Acc (&sums)[kSide][kSide]) {
  Acc of_rows[kFetched], of_columns[kFetched];
  rows.fetch(0, depth, of_rows);
  columns.fetch(0, depth, of_columns);
  for (int32_t at = 0; at < depth; at += kDepth) {
    rows.for_each_fetched([&](int j, int line, int step) { tiles.rows[step][line] = of_rows[j]; });
    columns.for_each_fetched(
        [&](int j, int line, int step) { tiles.columns[step][line] = of_columns[j]; });
    __syncthreads();
    rows.fetch(at + kDepth, depth, of_rows);
    columns.fetch(at + kDepth, depth, of_columns);
#pragma unroll 4
    for (int step = 0; step < kDepth; ++step) {
      const Pack<Acc, kSide> a = load_pack<Acc, kSide>(&tiles.rows[step][square.row]);
      const Pack<Acc, kSide> b = load_pack<Acc, kSide>(&tiles.columns[step][square.column]);
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
#pragma unroll
        for (int k = 0; k < kSide; ++k) {
          sums[i][k] += a.values[i] * b.values[k];
        }
      }
    }
    __syncthreads();
  }
}

// The adapted student: channels first_channel to first_channel + 63 of the rows.
template <typename Acc>
__device__ __forceinline__ void adapt(
    const ImitationLevel& level,
    const Rows& rows,
    int32_t first_channel,
    const Square& square,
    Tiles<Acc>& tiles,
    Acc (&adapted)[kSide][kSide]) {
  const int32_t c_s = level.student.channels, c_t = level.teacher.channels;
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
#pragma unroll
    for (int k = 0; k < kSide; ++k) {
      adapted[i][k] = 0;
    }
  }
  const Operand<void> student = {
      level.student.numbers,
      rows.student,
      false,
      0,
      kTile,
      0,
      channel_step(level.student, level.cells)};
  const Operand<void> weight = {level.weight, nullptr, false, first_channel, c_t, c_s, 1};
  multiply(student, weight, c_s, square, tiles, adapted);
  if (level.bias.data != nullptr) {
    const int32_t channel = first_channel + square.column;
    Acc bias[kSide];
    load(level.bias, channel, c_t - channel, false, bias);
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int k = 0; k < kSide; ++k) {
        adapted[i][k] += bias[k];
      }
    }
  }
}

// The numbers of four rows of a map, from `channel` on; 0 where there is none.
template <typename Acc>
__device__ __forceinline__ void gather(
    const StoredMap& map,
    int64_t cells,
    const int64_t* places,
    int32_t channel,
    Acc (&values)[kSide][kSide]) {
  const int64_t step = channel_step(map, cells);
  as_stored(map.numbers, [&](const auto* data) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const int32_t left = places[i] < 0 ? 0 : map.channels - channel;
      if (map.channels_last) {
        load(data + places[i] + channel, left, map.aligned, values[i]);
      } else {
#pragma unroll
        for (int k = 0; k < kSide; ++k) {
          values[i][k] =
              k < left ? static_cast<Acc>(data[places[i] + (channel + k) * step]) : Acc(0);
        }
      }
    }
  });
}

template <typename Acc>
__device__ __forceinline__ void scatter(
    const StoredMap& map,
    int64_t cells,
    const int64_t* places,
    int32_t channel,
    const Acc (&values)[kSide][kSide]) {
  const int64_t step = channel_step(map, cells);
  as_stored(map.numbers, [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const int32_t left = places[i] < 0 ? 0 : map.channels - channel;
      if (map.channels_last) {
        store(data + places[i] + channel, left, map.aligned, values[i]);
      } else {
#pragma unroll
        for (int k = 0; k < kSide; ++k) {
          if (k < left) {
            data[places[i] + (channel + k) * step] = static_cast<T>(values[i][k]);
          }
        }
      }
    }
  });
}

// The weight of a row's cell, or a cosine's factor; 0 where there is no row.
template <typename Acc>
__device__ __forceinline__ Acc cell_number(const void* numbers, int64_t offset, int32_t cell) {
  if (cell < 0) {
    return 0;
  }
  return numbers != nullptr ? static_cast<const Acc*>(numbers)[offset + cell] : Acc(1);
}

// --------------------------------------------------------------------------------------- forward
// A block takes a tile of rows over all channels.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) adapted_distance_kernel(
    const __grid_constant__ ImitationLevels table,
    const __grid_constant__ BlocksOfLevels blocks,
    Distance distance) {
  __shared__ Rows rows;
  __shared__ Tiles<Acc> tiles;
  const int l = blocks.level(blockIdx.x);
  const ImitationLevel& level = table.levels[l];
  const int64_t tile = blockIdx.x - blocks.first[l], count = count_of_rows(level);
  Acc* const sum = static_cast<Acc*>(level.sums) + tile;
  if (tile * kTile >= count) {
    if (threadIdx.x == 0) {
      *sum = 0;
    }
    return;
  }
  const bool cosine = distance == Distance::kCosine;
  // Cosines are summed over lanes.
  const Square square(!cosine && !level.teacher.channels_last);
  load_rows(level, tile * kTile, count, rows);
  __syncthreads();

  Acc weights[kSide];
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    weights[i] = cell_number<Acc>(level.cell_weights, 0, rows.cell[square.row + i]);
  }
  Acc loss = 0, products[3][kSide] = {};
  for (int32_t first = 0; first < level.teacher.channels; first += kTile) {
    Acc s[kSide][kSide], t[kSide][kSide];
    adapt(level, rows, first, square, tiles, s);
    const int32_t channel = first + square.column;
    gather(level.teacher, level.cells, rows.teacher + square.row, channel, t);
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      if (cosine) {
#pragma unroll
        for (int k = 0; k < kSide; ++k) {
          products[0][i] += s[i][k] * t[i][k];
          products[1][i] += s[i][k] * s[i][k];
          products[2][i] += t[i][k] * t[i][k];
        }
      } else if (weights[i] != 0) {
        Acc of_channels[kSide], sum_of_row = 0;
        load_channel_weights(level, rows.cell[square.row + i] / level.cells, channel, of_channels);
#pragma unroll
        for (int k = 0; k < kSide; ++k) {
          const Acc term = of_channels[k] * distance_of(distance, s[i][k] - t[i][k]);
          sum_of_row += of_channels[k] != 0 ? term : Acc(0);
        }
        loss += weights[i] * sum_of_row;
      }
    }
  }
  if (cosine) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const Acc st = lane_sum(products[0][i], kGroups);
      const Acc ss = lane_sum(products[1][i], kGroups);
      const Acc tt = lane_sum(products[2][i], kGroups);
      if (threadIdx.x % kGroups == 0 && weights[i] != 0) {
        const CosineCell<Acc> of_cell = cosine_cell(st, ss, tt);
        Acc* const factors = static_cast<Acc*>(level.coefficients) + rows.cell[square.row + i];
        factors[0] = weights[i] * of_cell.student;
        factors[level.images * level.cells] = weights[i] * of_cell.teacher;
        loss += weights[i] * of_cell.distance;
      }
    }
  }
  Acc sums[1] = {loss};
  block_sums<kThreads>(sums);
  if (threadIdx.x == 0) {
    *sum = sums[0];
  }
}

// A block takes several tiles of rows, one after the other, and a tile of channels.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) adapted_moments_kernel(
    const __grid_constant__ ImitationLevels table, const __grid_constant__ BlocksOfLevels blocks) {
  __shared__ Rows rows;
  __shared__ Tiles<Acc> tiles;
  const int l = blocks.level(blockIdx.x);
  const ImitationLevel& level = table.levels[l];
  const int64_t local = blockIdx.x - blocks.first[l], count = count_of_rows(level);
  const int64_t part = local % level.moment_parts;
  const int32_t first_channel = static_cast<int32_t>(local / level.moment_parts * kTile);
  const Square square(/*lanes_along_rows=*/true);
  const int32_t channel = first_channel + square.column;
  MomentSums<Acc> sums;
  for (int tile = 0; tile < kMomentTiles; ++tile) {
    const int64_t first = (part * kMomentTiles + tile) * kTile;
    if (first >= count) {
      break;
    }
    __syncthreads();
    load_rows(level, first, count, rows);
    __syncthreads();
    Acc s[kSide][kSide], t[kSide][kSide];
    adapt(level, rows, first_channel, square, tiles, s);
    gather(level.teacher, level.cells, rows.teacher + square.row, channel, t);
    sums.add(s, t, count - first - square.row);
  }
#pragma unroll
  for (int k = 0; k < kSide; ++k) {
    PartialMoments<Acc> own = sums.of_channel(k);
    for (int bits = kGroups / 2; bits > 0; bits /= 2) {
      own.merge(own.of_lane(bits));
    }
    if (threadIdx.x % kGroups == 0 && channel + k < level.teacher.channels) {
      static_cast<PartialMoments<Acc>*>(
          level.moments)[part * level.teacher.channels + channel + k] = own;
    }
  }
}

// -------------------------------------------------------------------------------------- backward
// Tiles of rows whose gradients exist at a time: `count` from `first` on, of all levels' tiles.
struct Window {
  BlocksOfLevels tiles;
  int32_t first, count;
  Numbers adapted; // (count * kTile, pitch) of Acc
  int64_t pitch;
};

// The gradient of the adapted student: a tile of rows by a tile of channels.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) adapted_gradient_kernel(
    const __grid_constant__ ImitationLevels table,
    const __grid_constant__ Window window,
    const ImitationScale given,
    Distance distance) {
  __shared__ Rows rows;
  __shared__ Tiles<Acc> tiles;
  const int32_t tile = window.first + int32_t(blockIdx.x);
  const int l = window.tiles.level(tile);
  const ImitationLevel& level = table.levels[l];
  const int64_t first = int64_t(tile - window.tiles.first[l]) * kTile;
  const int64_t count = count_of_rows(level);
  const int32_t first_channel = int32_t(blockIdx.y) * kTile;
  if (first >= count || first_channel >= level.teacher.channels) {
    return;
  }
  const Square square(!level.teacher.channels_last);
  load_rows(level, first, count, rows);
  __syncthreads();
  Acc s[kSide][kSide], t[kSide][kSide];
  adapt(level, rows, first_channel, square, tiles, s);
  const int32_t channel = first_channel + square.column;
  gather(level.teacher, level.cells, rows.teacher + square.row, channel, t);

  const Acc scale = *static_cast<const Acc*>(given.grad) * static_cast<Acc>(given.scales[l]);
  const bool cosine = distance == Distance::kCosine;
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    const int32_t cell = rows.cell[square.row + i];
    if (cell < 0) {
      continue;
    }
    const Acc weight = cell_number<Acc>(cosine ? level.coefficients : level.cell_weights, 0, cell);
    const Acc of_teacher =
        cosine ? cell_number<Acc>(level.coefficients, level.images * level.cells, cell) : Acc(0);
    const ChannelFactors<Acc> of_channels(level, distance, cell / level.cells, channel);
    Acc out[kSide];
#pragma unroll
    for (int k = 0; k < kSide; ++k) {
      out[k] = scale * gradient_of(distance, s[i][k], t[i][k], weight, of_teacher, of_channels, k);
    }
    const int64_t row = int64_t(blockIdx.x) * kTile + square.row + i;
    store(
        static_cast<Acc*>(window.adapted.data) + row * window.pitch + channel,
        level.teacher.channels - channel,
        window.pitch % kSide == 0,
        out);
  }
}

// The gradient of the student where cells count: a tile of rows by a tile of the student's
// channels.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) input_gradient_kernel(
    const __grid_constant__ ImitationLevels table, const __grid_constant__ Window window) {
  __shared__ Rows rows;
  __shared__ Tiles<Acc> tiles;
  const int32_t tile = window.first + int32_t(blockIdx.x);
  const int l = window.tiles.level(tile);
  const ImitationLevel& level = table.levels[l];
  const int32_t c_s = level.student.channels, c_t = level.teacher.channels;
  const int64_t first = int64_t(tile - window.tiles.first[l]) * kTile;
  const int64_t count = count_of_rows(level);
  const int32_t first_channel = int32_t(blockIdx.y) * kTile;
  if (first >= count || first_channel >= c_s) {
    return;
  }
  const Square square(!level.student.channels_last);
  load_rows(level, first, count, rows); // read after the product, which has barriers
  const int32_t first_line = int32_t(blockIdx.x) * kTile;
  const int32_t here = count - first < kTile ? int32_t(count - first) : kTile;
  const Operand<Acc> adapted = {
      window.adapted, nullptr, false, first_line, first_line + here, window.pitch, 1};
  const Operand<void> weight = {level.weight, nullptr, false, first_channel, c_s, 1, c_s};
  Acc out[kSide][kSide] = {};
  multiply(adapted, weight, c_t, square, tiles, out);

  const int32_t channel = first_channel + square.column;
  const int64_t* places = rows.student + square.row;
  const StoredMap& student = level.student;
  const StoredMap gradient = {
      level.gradient, student.channels, student.channels_last, student.aligned};
  scatter(gradient, level.cells, places, channel, out);
}

// Adds to the sums of adapters what the window's rows give: a split of a level's tiles by a tile of
// the weight. Every split takes every so manieth tile, so that its rows do not depend on windows.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) weight_gradient_kernel(
    const __grid_constant__ ImitationLevels table, const __grid_constant__ Window window) {
  __shared__ Rows rows;
  __shared__ Tiles<Acc> tiles;
  const ImitationLevel& level = table.levels[blockIdx.z];
  const int32_t c_s = level.student.channels, c_t = level.teacher.channels;
  const int32_t across = c_s > kTile ? (c_s + kTile - 1) / kTile : 1;
  const int32_t first_row = int32_t(blockIdx.y) / across * kTile;
  const int32_t first_column = int32_t(blockIdx.y) % across * kTile;
  const int32_t begin = window.tiles.first[blockIdx.z], end = window.tiles.first[blockIdx.z + 1];
  if (int(blockIdx.x) >= level.splits || first_row >= c_t || begin == end) {
    return;
  }
  const Square square(/*lanes_along_rows=*/false);
  const int64_t count = count_of_rows(level);
  // The bias is the same sum without the student: four threads share a channel.
  const int32_t channel = first_row + int32_t(threadIdx.x) % kTile;
  const bool with_bias = level.bias_sums != nullptr && first_column == 0 && channel < c_t;
  Acc weight[kSide][kSide] = {}, bias = 0;
  bool any = false;
  for (int32_t tile = begin + int32_t(blockIdx.x); tile < end; tile += level.splits) {
    const int64_t first = int64_t(tile - begin) * kTile;
    if (tile < window.first || tile >= window.first + window.count || first >= count) {
      continue;
    }
    any = true;
    load_rows(level, first, count, rows);
    __syncthreads();
    const int32_t here = count - first < kTile ? int32_t(count - first) : kTile;
    const Numbers adapted = {
        static_cast<Acc*>(window.adapted.data) +
            int64_t(tile - window.first) * kTile * window.pitch,
        window.adapted.storage};
    const Operand<Acc> lines = {adapted, nullptr, false, first_row, c_t, 1, window.pitch};
    const Operand<void> columns = {
        level.student.numbers,
        rows.student,
        true,
        first_column,
        c_s,
        channel_step(level.student, level.cells),
        0};
    // Sums over a tile are short, and so are those over tiles.
    Acc sums[kSide][kSide] = {}, of_channel = 0;
    multiply(lines, columns, here, square, tiles, sums);
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int k = 0; k < kSide; ++k) {
        weight[i][k] += sums[i][k];
      }
    }
#pragma unroll 1
    for (int row = threadIdx.x / kTile; with_bias && row < here; row += kThreads / kTile) {
      of_channel += static_cast<const Acc*>(adapted.data)[row * window.pitch + channel];
    }
    bias += of_channel;
  }
  if (!any) {
    return;
  }
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
#pragma unroll
    for (int k = 0; k < kSide; ++k) {
      const int32_t row = first_row + square.row + i, column = first_column + square.column + k;
      if (row < c_t && column < c_s) {
        static_cast<Acc*>(level.weight_sums)[(int64_t(blockIdx.x) * c_t + row) * c_s + column] +=
            weight[i][k];
      }
    }
  }
  tiles.rows[threadIdx.x / kTile][threadIdx.x % kTile] = bias;
  __syncthreads();
  if (with_bias && threadIdx.x < kTile) {
    for (int part = 1; part < kThreads / kTile; ++part) {
      bias += tiles.rows[part][threadIdx.x];
    }
    static_cast<Acc*>(level.bias_sums)[int64_t(blockIdx.x) * c_t + channel] += bias;
  }
}

struct AdapterTable {
  AdapterSums adapters[kMaxAdapters];
};

// Adds the splits and levels of an adapter up, in double.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    finish_adapters_kernel(const __grid_constant__ AdapterTable table) {
  const AdapterSums& adapter = table.adapters[blockIdx.y];
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < adapter.size) {
    double sum = 0;
    for (int64_t part = 0; part < adapter.count; ++part) {
      sum += static_cast<const Acc*>(adapter.sums)[part * adapter.size + i];
    }
    store(adapter.gradient, i, sum);
  }
}

int64_t row_tiles(const ImitationLevel& level) {
  const bool any = level.adapted && level.teacher.channels > 0;
  return any ? divided_up(level.images * level.cells, kTile) : 0;
}

} // namespace

int64_t adapted_distance_sums(const ImitationLevel& level) {
  return row_tiles(level);
}

int64_t adapted_moment_parts(const ImitationLevel& level) {
  return divided_up(row_tiles(level), kMomentTiles);
}

void adapted_distances(
    const ImitationLevels& levels, Distance distance, bool is_double, cudaStream_t stream) {
  const bool pkd = distance == Distance::kPkd;
  const BlocksOfLevels blocks = blocks_of_levels(levels, [&](const ImitationLevel& level) {
    return pkd ? adapted_moment_parts(level) * divided_up(level.teacher.channels, kTile)
               : row_tiles(level);
  });
  if (blocks.total() == 0) {
    return;
  }
  dispatch_loss_type(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    if (pkd) {
      HKD_LAUNCH(adapted_moments_kernel<Acc>, blocks.total(), kThreads, 0, stream, levels, blocks);
    } else {
      HKD_LAUNCH(
          adapted_distance_kernel<Acc>,
          blocks.total(),
          kThreads,
          0,
          stream,
          levels,
          blocks,
          distance);
    }
  });
}

int64_t rows_at_once(const ImitationLevels& levels) {
  const int64_t tiles = blocks_of_levels(levels, row_tiles).total();
  return kTile * (tiles < kTilesAtOnce ? tiles : kTilesAtOnce);
}

int32_t splits_of_weight(const ImitationLevel& level) {
  const int64_t tiles = row_tiles(level);
  return static_cast<int32_t>(tiles < kMostSplits ? tiles : kMostSplits);
}

void adapted_gradients(
    const ImitationLevels& levels,
    const ImitationScale& scale,
    Distance distance,
    void* adapted,
    int64_t pitch,
    bool is_double,
    cudaStream_t stream) {
  Window window{};
  window.tiles = blocks_of_levels(levels, row_tiles);
  window.adapted = {adapted, is_double ? Storage::kDouble : Storage::kFloat};
  window.pitch = pitch;
  int64_t inputs = 0, outputs = 0, weights = 0, splits = 0; // most tiles of a level
  for (int l = 0; l < levels.count; ++l) {
    const ImitationLevel& level = levels.levels[l];
    if (row_tiles(level) > 0) {
      const int64_t c_s = divided_up(level.student.channels, kTile);
      const int64_t c_t = divided_up(level.teacher.channels, kTile);
      inputs = c_s > inputs ? c_s : inputs;
      outputs = c_t > outputs ? c_t : outputs;
      const int64_t tiles = c_t * (c_s > 0 ? c_s : 1);
      weights = tiles > weights ? tiles : weights;
      splits = level.splits > splits ? level.splits : splits;
    }
  }
  dispatch_loss_type(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    const int64_t tiles = window.tiles.total();
    for (int64_t first = 0; first < tiles; first += kTilesAtOnce) {
      window.first = static_cast<int32_t>(first);
      window.count =
          static_cast<int32_t>(tiles - first < kTilesAtOnce ? tiles - first : kTilesAtOnce);
      HKD_LAUNCH(
          adapted_gradient_kernel<Acc>,
          dim3(window.count, outputs),
          kThreads,
          0,
          stream,
          levels,
          window,
          scale,
          distance);
      if (inputs > 0) {
        HKD_LAUNCH(
            input_gradient_kernel<Acc>,
            dim3(window.count, inputs),
            kThreads,
            0,
            stream,
            levels,
            window);
      }
      HKD_LAUNCH(
          weight_gradient_kernel<Acc>,
          dim3(splits, weights, levels.count),
          kThreads,
          0,
          stream,
          levels,
          window);
    }
  });
}

void finish_adapters(
    const AdapterSums* adapters, int64_t count, bool is_double, cudaStream_t stream) {
  dispatch_loss_type(is_double, [&](auto acc) {
    for (int64_t first = 0; first < count; first += kMaxAdapters) {
      AdapterTable table{};
      const int64_t here = count - first < kMaxAdapters ? count - first : kMaxAdapters;
      int64_t largest = 0;
      for (int64_t i = 0; i < here; ++i) {
        table.adapters[i] = adapters[first + i];
        largest = table.adapters[i].size > largest ? table.adapters[i].size : largest;
      }
      if (largest > 0) {
        HKD_LAUNCH(
            finish_adapters_kernel<decltype(acc)>,
            dim3(divided_up(largest, kThreads), here),
            kThreads,
            0,
            stream,
            table);
      }
    }
  });
}

} // namespace hkd
