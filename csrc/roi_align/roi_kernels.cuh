// RoIAlign on the device: how a block pools bins of one box into a tile in shared memory.
#pragma once

#include "hkd/reduce.cuh"
#include "hkd/storage.cuh"
#include "roi_align/roi_kernels.h"

namespace hkd {

constexpr int kThreads = 256;
constexpr int kTileBins = 8;      // a side
constexpr int kTileChannels = 64; // of bins, and of cells

// Channels that a thread takes together where they are neighbours.
template <typename Acc>
constexpr int kPack = roi_pack(sizeof(Acc) == sizeof(double));

// Blocks that a multiprocessor is to run at once: the registers that a thread gets without
// spilling.
template <typename Acc>
constexpr int kRoiBlocksAtOnce = sizeof(Acc) == sizeof(double) ? 1 : 2;

// Values of bins [row][column][channel]. The padding spreads neighbouring bins over the banks and
// keeps packs aligned.
template <typename Acc>
struct BinTile {
  static constexpr int kStride = kTileChannels + 16 / sizeof(Acc);
  alignas(16) Acc values[kTileBins * kTileBins * kStride];

  __device__ Acc* at(int row, int column, int channel) {
    return values + (row * kTileBins + column) * kStride + channel;
  }
};

// Bins [row, row + rows) x [column, column + columns) and channels [channel, channel + channels)
// that a block has in its tile.
struct TileRange {
  int row, rows, column, columns, channel, channels;

  __device__ TileRange(int row, int column, int channel, const Sampling& s, int64_t width)
      : row(row),
        rows(min(kTileBins, s.rows - row)),
        column(column),
        columns(min(kTileBins, s.columns - column)),
        channel(channel),
        channels(static_cast<int>(min(int64_t(kTileChannels), width - channel))) {
  }
};

// What a block of one RoI, tile of bins and step of channels takes.
struct TileOfBlock {
  int64_t roi;
  TileRange range;

  __device__ TileOfBlock(const Sampling& sampling, int64_t channels)
      : TileOfBlock(sampling, channels, steps(channels)) {
  }

  static __host__ __device__ int64_t steps(int64_t channels) {
    return (channels + kTileChannels - 1) / kTileChannels;
  }
  static __host__ __device__ int across(const Sampling& sampling) {
    return (sampling.columns + kTileBins - 1) / kTileBins;
  }
  // Blocks of a RoI.
  static __host__ __device__ int64_t count(const Sampling& sampling, int64_t channels) {
    const int down = (sampling.rows + kTileBins - 1) / kTileBins;
    return int64_t(down) * across(sampling) * steps(channels);
  }

 private:
  __device__ TileOfBlock(const Sampling& sampling, int64_t channels, int64_t steps)
      : roi(blockIdx.x / count(sampling, channels)),
        range(
            static_cast<int>(blockIdx.x % count(sampling, channels) / steps / across(sampling)) *
                kTileBins,
            static_cast<int>(blockIdx.x / steps % across(sampling)) * kTileBins,
            static_cast<int>(blockIdx.x % steps) * kTileChannels,
            sampling,
            channels) {
  }
};

// Calls body(row, column, channel), counted from the tile's, for every number of a tile. Threads
// are neighbours where bins are or, `by_channel`, where channels are. kAtOnce numbers of a thread
// are under way together.
template <int kAtOnce, typename Body>
__device__ __forceinline__ void for_each_number(
    const TileRange& range, bool by_channel, const Body& body) {
  const int thread = threadIdx.x, bins = range.rows * range.columns;
  if (by_channel) {
    const int channel = thread % kTileChannels;
#pragma unroll kAtOnce
    for (int bin = thread / kTileChannels; bin < bins; bin += kThreads / kTileChannels) {
      if (channel < range.channels) {
        body(bin / range.columns, bin % range.columns, channel);
      }
    }
  } else {
    const int bin = thread % bins, step = kThreads / bins;
    const int row = bin / range.columns, column = bin % range.columns;
#pragma unroll kAtOnce
    for (int channel = thread / bins; channel < range.channels && thread < step * bins;
         channel += step) {
      body(row, column, channel);
    }
  }
}

// ------------------------------------------------------------------------------------- samples
// Samples of a bin [first, first + count), among which are all that lie in a stretch of cells.
template <typename Acc>
struct SampleRange {
  Acc first;
  int count;
};

// The count is the same for every bin and every stretch of `cells`. The margin covers the rounding
// of positions; where Acc cannot tell neighbouring samples of a giant box apart, it is bounded.
template <typename Acc>
__device__ __forceinline__ SampleRange<Acc> samples_between(
    const AxisSamples<Acc>& axis, int bins, int bin, Acc low, Acc cells, int length) {
  constexpr Acc kEpsilon = sizeof(Acc) == sizeof(double) ? Acc(2e-16) : Acc(1e-7);
  constexpr int kFew = 8;
  if (axis.grid <= kFew || axis.bin == 0) {
    return {Acc(0), static_cast<int>(axis.grid)};
  }
  const Acc step = axis.bin / axis.grid, size = step < 0 ? -step : step;
  const Acc start = axis.start < 0 ? -axis.start : axis.start;
  const Acc reach = start + static_cast<Acc>(length) + static_cast<Acc>(bins) * size * axis.grid;
  const Acc margin = 3 + min(8 * kEpsilon * reach / size, static_cast<Acc>(length + 64));
  const Acc count = min(axis.grid, std::floor(cells / size + 2 * margin + 2));
  const Acc origin = axis.start + static_cast<Acc>(bin) * axis.bin;
  const Acc nearest = ((step < 0 ? low + cells : low) - origin) / step - Acc(0.5);
  const Acc first = max(Acc(0), min(std::floor(nearest - margin), axis.grid - count));
  return {first, static_cast<int>(count)};
}

// The weight of a cell in a bin: the sum over its samples, of which few are near.
template <typename Acc>
__device__ __forceinline__ Acc
cell_weight(const AxisSamples<Acc>& axis, int bins, int bin, int cell, int length) {
  const SampleRange<Acc> range =
      samples_between(axis, bins, bin, static_cast<Acc>(cell - 1), Acc(2), length);
  Acc sum = 0;
#pragma unroll 1
  for (int i = 0; i < range.count; ++i) {
    Bilinear<Acc> taps;
    const Acc sample = range.first + static_cast<Acc>(i);
    if (bilinear(axis.position(bin, sample), length, &taps)) {
      sum += taps.low == cell ? taps.low_weight : Acc(0);
      sum += taps.high == cell ? taps.high_weight : Acc(0);
    }
  }
  return axis.grid > 0 ? sum / axis.grid : Acc(0);
}

// ------------------------------------------------------------------------------------- pooling
// The merged taps of one axis: cells and weights of each bin of a tile, for a few samples at a
// time. A bin with more samples (a giant box) takes several passes.
template <typename Acc>
struct AxisTaps {
  static constexpr int kSamples = 8; // of a pass; each has at most two taps
  int counts[kTileBins];
  int cells[kTileBins][2 * kSamples];
  Acc weights[kTileBins][2 * kSamples];

  static __device__ int passes(const AxisSamples<Acc>& axis, int bins, int length) {
    return (samples_in_map(axis, bins, 0, length).count + kSamples - 1) / kSamples;
  }

  // Of the bin `first_bin + place`, by one thread.
  __device__ void build(
      const AxisSamples<Acc>& axis, int bins, int first_bin, int place, int length, int pass) {
    const SampleRange<Acc> range = samples_in_map(axis, bins, first_bin + place, length);
    const int begin = pass * kSamples, end = min(begin + kSamples, range.count);
    int count = 0;
    // A later sample shares cells with the one before, or with none.
    const auto add = [&](int cell, Acc weight) {
      if (weight == 0) {
        return;
      }
      for (int i = count; i > max(0, count - 2); --i) {
        if (cells[place][i - 1] == cell) {
          weights[place][i - 1] += weight;
          return;
        }
      }
      cells[place][count] = cell;
      weights[place][count++] = weight;
    };
#pragma unroll 1
    for (int i = begin; i < end; ++i) {
      Bilinear<Acc> taps;
      const Acc sample = range.first + static_cast<Acc>(i);
      if (bilinear(axis.position(first_bin + place, sample), length, &taps)) {
        add(taps.low, taps.low_weight);
        add(taps.high, taps.high_weight);
      }
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      weights[place][i] /= axis.grid;
    }
    counts[place] = count;
  }

 private:
  static __device__ SampleRange<Acc> samples_in_map(
      const AxisSamples<Acc>& axis, int bins, int bin, int length) {
    return samples_between(axis, bins, bin, Acc(-1), static_cast<Acc>(length + 1), length);
  }
};

// Calls body(cell, weight) for the cells of a bin, as elements from the first of the image on.
template <int kAtOnce, typename Acc, typename Body>
__device__ __forceinline__ void for_each_cell(
    const AxisTaps<Acc>& rows,
    const AxisTaps<Acc>& columns,
    int row,
    int column,
    int64_t row_stride,
    int64_t column_stride,
    const Body& body) {
#pragma unroll 1
  for (int r = 0; r < rows.counts[row]; ++r) {
    const int64_t first = rows.cells[row][r] * row_stride;
    const Acc weight = rows.weights[row][r];
#pragma unroll kAtOnce
    for (int c = 0; c < columns.counts[column]; ++c) {
      body(first + columns.cells[column][c] * column_stride, weight * columns.weights[column][c]);
    }
  }
}

// Adds `sign` times RoIAlign of a map to a tile, or sets it, where `first`. Every thread of the
// block takes part, and finds its own numbers of the tile in order; the others' after a barrier.
// Where a map is read in packs, a thread reads kCount channels.
template <int kCount, typename Acc>
__device__ __forceinline__ void pool(
    const SampledRoi<Acc>& roi,
    const Sampling& sampling,
    const RoiMap& map,
    int64_t channels,
    const TileRange& range,
    Acc sign,
    bool first,
    BinTile<Acc>& tile) {
  __shared__ AxisTaps<Acc> rows, columns;
  constexpr int kAtOnce = kCount == kPack<Acc> ? 2 : 1;
  const int height = sampling.heights[roi.level], width = sampling.widths[roi.level];
  const int64_t plane = int64_t(height) * width, image = roi.image * channels * plane;
  const int row_passes = AxisTaps<Acc>::passes(roi.rows, sampling.rows, height);
  const int column_passes = AxisTaps<Acc>::passes(roi.columns, sampling.columns, width);
  // A box without samples gets one pass over none.
  const int passes = max(1, row_passes * column_passes);
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    __syncthreads(); // the taps before have been read
    const int place = threadIdx.x % kTileBins;
    if (threadIdx.x < kTileBins && place < range.rows) {
      rows.build(roi.rows, sampling.rows, range.row, place, height, pass / max(1, column_passes));
    } else if (threadIdx.x >= 32 && threadIdx.x < 32 + kTileBins && place < range.columns) {
      columns.build(
          roi.columns, sampling.columns, range.column, place, width, pass % max(1, column_passes));
    }
    __syncthreads();
    const bool set = first && pass == 0;
    if (map.packs) {
      constexpr int kPacks = kTileChannels / kCount;
      const int channel = int(threadIdx.x) % kPacks * kCount;
      const int64_t base = image + range.channel + channel;
#pragma unroll 1
      for (int bin = threadIdx.x / kPacks; bin < range.rows * range.columns;
           bin += kThreads / kPacks) {
        if (channel >= range.channels) {
          continue;
        }
        const int row = bin / range.columns, column = bin % range.columns;
        Acc sum[kCount] = {};
        as_stored(map.numbers, [&](const auto* data) {
          using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
          if constexpr (sizeof(T) <= sizeof(Acc)) { // as `packs` promises
            for_each_cell<kAtOnce>(
                rows, columns, row, column, width * channels, channels, [&](int64_t at, Acc w) {
                  const Pack<T, kCount> pack = load_pack<T, kCount>(data + base + at);
#pragma unroll
                  for (int k = 0; k < kCount; ++k) {
                    sum[k] += w * static_cast<Acc>(pack.values[k]);
                  }
                });
          }
        });
        Acc* values = tile.at(row, column, channel);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          values[k] = (set ? Acc(0) : values[k]) + sign * sum[k];
        }
      }
    } else {
      const int64_t channel_stride = map.channels_last ? 1 : plane;
      const int64_t column_stride = map.channels_last ? channels : 1;
      for_each_number<1>(range, map.channels_last, [&](int row, int column, int channel) {
        Acc sum = 0;
        as_stored(map.numbers, [&](const auto* data) {
          const auto* from = data + image + (range.channel + channel) * channel_stride;
          for_each_cell<kAtOnce>(
              rows,
              columns,
              row,
              column,
              width * column_stride,
              column_stride,
              [&](int64_t at, Acc weight) { sum += weight * static_cast<Acc>(from[at]); });
        });
        Acc* value = tile.at(row, column, channel);
        *value = (set ? Acc(0) : *value) + sign * sum;
      });
    }
  }
}

// Calls body(Acc{}).
template <typename Body>
void dispatch_accumulate(bool is_double, const Body& body) {
  is_double ? body(double{}) : body(float{});
}

} // namespace hkd
