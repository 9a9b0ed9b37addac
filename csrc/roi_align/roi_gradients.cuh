// How the gradients of bins come to the cells of the maps. There are two plans: a block owns cells
// and gathers from the RoIs that touch them, or owns bins of a RoI and scatters to the cells.
#pragma once

#include "roi_align/roi_kernels.cuh"

namespace hkd {

// Cells of a map that a block takes together.
constexpr int kCellRows = 8, kCellColumns = 8;

// The place of a thread among those of the block that have a hit, in their order; *total is their
// number.
__device__ __forceinline__ int place_among_hits(bool hit, int* total) {
  __shared__ int counts[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned hits = __ballot_sync(kAllLanes, hit);
  __syncthreads(); // the counts before have been read
  if (lane == 0) {
    counts[warp] = __popc(hits);
  }
  __syncthreads();
  int place = __popc(hits & ((1u << lane) - 1));
  *total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    place += w < warp ? counts[w] : 0;
    *total += counts[w];
  }
  return place;
}

// Weights of the cells of a tile in some bins of a box, and for each cell the bins that have one.
template <typename Acc>
struct CellWeights {
  Acc rows[kCellRows][kTileBins], columns[kCellColumns][kTileBins];
  unsigned row_bins[kCellRows], column_bins[kCellColumns];

  // Of the cells from (top, left) on: one thread a cell and bin, of rows and then of columns. A
  // barrier follows.
  __device__ __forceinline__ void build(
      const SampledRoi<Acc>& roi,
      const Sampling& sampling,
      const TileRange& range,
      int top,
      int left) {
    static_assert(kTileBins * (kCellRows + kCellColumns) <= kThreads);
    const int thread = threadIdx.x;
    if (thread >= kTileBins * (kCellRows + kCellColumns)) { // whole warps
      return;
    }
    const int height = sampling.heights[roi.level], width = sampling.widths[roi.level];
    const bool of_row = thread < kTileBins * kCellRows;
    const int bin = thread % kTileBins;
    const int cell = thread / kTileBins - (of_row ? 0 : kCellRows);
    Acc weight = 0;
    if (of_row && bin < range.rows && top + cell < height) {
      weight = cell_weight(roi.rows, sampling.rows, range.row + bin, top + cell, height);
    } else if (!of_row && bin < range.columns && left + cell < width) {
      weight = cell_weight(roi.columns, sampling.columns, range.column + bin, left + cell, width);
    }
    const unsigned used =
        __ballot_sync(kAllLanes, weight != 0) >> (thread % 32 - bin) & ((1u << kTileBins) - 1);
    (of_row ? rows : columns)[cell][bin] = weight;
    (of_row ? row_bins : column_bins)[cell] = used;
  }

  // The bins that some cell has.
  __device__ unsigned all_row_bins() const {
    unsigned bins = 0;
    for (int y = 0; y < kCellRows; ++y) {
      bins |= row_bins[y];
    }
    return bins;
  }
  __device__ unsigned all_column_bins() const {
    unsigned bins = 0;
    for (int x = 0; x < kCellColumns; ++x) {
      bins |= column_bins[x];
    }
    return bins;
  }
};

// ------------------------------------------------------------------------------------- gather
// The cells and channels of a block.
struct CellTile {
  int level, image, top, left, channel, channels;

  __device__ CellTile(const RoiGradients& gradients, const Sampling& sampling) {
    const int block = blockIdx.x;
    level = sampling.levels - 1;
    while (block < gradients.first_block[level]) {
      --level;
    }
    const int down = (sampling.heights[level] + kCellRows - 1) / kCellRows;
    const int across = (sampling.widths[level] + kCellColumns - 1) / kCellColumns;
    const int64_t steps = (gradients.pyramid.channels + kTileChannels - 1) / kTileChannels;
    int64_t rest = block - gradients.first_block[level];
    channel = static_cast<int>(rest % steps) * kTileChannels;
    rest /= steps;
    left = static_cast<int>(rest % across) * kCellColumns;
    rest /= across;
    top = static_cast<int>(rest % down) * kCellRows;
    image = static_cast<int>(rest / down);
    channels = static_cast<int>(min(int64_t(kTileChannels), gradients.pyramid.channels - channel));
  }
};

// Sums the gradient of a tile over its RoIs, in their order, and writes it once: no two blocks
// write to one cell, so no bit depends on their order. fill(row, roi, range, tile) puts gradients
// of bins into the block's tile; a barrier follows.
template <typename Acc, typename Fill>
__device__ __forceinline__ void gather_gradient(
    const RoiGradients& gradients,
    const Sampling& sampling,
    const Rois& table,
    const RoiGroups& groups,
    const Fill& fill) {
  constexpr int kCount = kPack<Acc>, kPacks = kTileChannels / kCount;
  constexpr int kLanes = kThreads / kPacks, kCells = kCellRows * kCellColumns / kLanes;
  __shared__ BinTile<Acc> bins;
  __shared__ CellWeights<Acc> weights;
  __shared__ int32_t hits[kThreads];

  const CellTile tile(gradients, sampling);
  const RoiMap& map = gradients.pyramid.maps[tile.level];
  const int height = sampling.heights[tile.level], width = sampling.widths[tile.level];
  const int thread = threadIdx.x;
  // Neighbouring threads store neighbouring numbers.
  const int lane = map.channels_last ? thread / kPacks : thread % kLanes;
  const int channel = (map.channels_last ? thread % kPacks : thread / kLanes) * kCount;

  Acc sums[kCells][kCount] = {};
  const int group = static_cast<int>(tile.level * sampling.images + tile.image);
  const int end = groups.starts[group + 1];
  bool touched = false;
  for (int begin = groups.starts[group]; begin < end; begin += kThreads) {
    const int entry = begin + thread;
    bool hit = false;
    if (entry < end) {
      const CellRange range = groups.touched[entry];
      hit = range.top < tile.top + kCellRows && range.bottom > tile.top &&
            range.left < tile.left + kCellColumns && range.right > tile.left;
    }
    int count;
    const int place = place_among_hits(hit, &count);
    if (hit) {
      hits[place] = groups.rows[entry];
    }
    __syncthreads();
    touched |= count > 0;
    for (int i = 0; i < count; ++i) {
      const int32_t row = hits[i];
      const SampledRoi<Acc>& roi = static_cast<const SampledRoi<Acc>*>(table.rois)[row];
      for (int first = 0; first < sampling.rows * sampling.columns;) {
        const int bin_row = first / sampling.columns, bin_column = first % sampling.columns;
        TileRange range(bin_row, bin_column, tile.channel, sampling, gradients.pyramid.channels);
        first = bin_column + kTileBins < sampling.columns
                    ? first + kTileBins
                    : (bin_row + kTileBins) * sampling.columns;

        weights.build(roi, sampling, range, tile.top, tile.left);
        __syncthreads();
        const unsigned row_bins = weights.all_row_bins();
        const unsigned column_bins = weights.all_column_bins();
        if (row_bins != 0 && column_bins != 0) {
          // Only the bins that the tile needs are filled.
          const int skip_rows = __ffs(row_bins) - 1, skip_columns = __ffs(column_bins) - 1;
          range.row += skip_rows;
          range.rows = 32 - __clz(row_bins) - skip_rows;
          range.column += skip_columns;
          range.columns = 32 - __clz(column_bins) - skip_columns;
          fill(row, roi, range, bins);
          __syncthreads();
          if (channel < tile.channels) {
#pragma unroll
            for (int j = 0; j < kCells; ++j) {
              const int y = (lane + j * kLanes) / kCellColumns;
              const int x = (lane + j * kLanes) % kCellColumns;
#pragma unroll 1
              for (unsigned p = weights.row_bins[y]; p != 0; p &= p - 1) {
                const int bin_y = __ffs(p) - 1;
#pragma unroll 1
                for (unsigned q = weights.column_bins[x]; q != 0; q &= q - 1) {
                  const int bin_x = __ffs(q) - 1;
                  const Acc weight = weights.rows[y][bin_y] * weights.columns[x][bin_x];
                  const Pack<Acc, kCount> values = load_pack<Acc, kCount>(
                      bins.at(bin_y - skip_rows, bin_x - skip_columns, channel));
#pragma unroll
                  for (int k = 0; k < kCount; ++k) {
                    sums[j][k] += weight * values.values[k];
                  }
                }
              }
            }
          }
        }
        __syncthreads(); // weights and bins have been read
      }
    }
  }

  if ((gradients.adds && !touched) || channel >= tile.channels) {
    return;
  }
  const int64_t channels = gradients.pyramid.channels, plane = int64_t(height) * width;
  const int64_t first = tile.image * channels * plane;
  const int count = min(kCount, tile.channels - channel);
#pragma unroll
  for (int j = 0; j < kCells; ++j) {
    const int y = tile.top + (lane + j * kLanes) / kCellColumns;
    const int x = tile.left + (lane + j * kLanes) % kCellColumns;
    if (y >= height || x >= width) {
      continue;
    }
    const int64_t cell = int64_t(y) * width + x;
    if (map.channels_last) {
      const int64_t at = first + cell * channels + tile.channel + channel;
      if (gradients.adds) {
        Acc before[kCount];
        load(map.numbers, at, count, map.packs, before);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          sums[j][k] += before[k];
        }
      }
      store(map.numbers, at, count, map.packs, sums[j]);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (k < count) {
          const int64_t at = first + (tile.channel + channel + k) * plane + cell;
          const Acc before = gradients.adds ? load<Acc>(map.numbers, at) : Acc(0);
          store(map.numbers, at, sums[j][k] + before);
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------- scatter
// Four neighbours from a multiple of 16 bytes on: one reduction from sm_90 on, four before.
__device__ __forceinline__ void add_four(float* to, const float (&values)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    atomicAdd(to + k, values[k]);
  }
#else
  atomicAdd(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
#endif
}

// Adds the gradients of a tile of bins of one RoI to the cells that it touches, a patch of cells at
// a time. Blocks add in any order, so bits may differ between runs. fill(row, roi, range, tile)
// puts gradients of bins into the block's tile; a barrier follows.
//
// A thread has a square: four cells of a row by four channels. It lies in memory as four vectors,
// one a cell (channels_last) or one a channel (NCHW, where rows begin at multiples of 16 bytes).
template <typename Fill>
__device__ __forceinline__ void scatter_gradient(
    const RoiPyramid& gradients,
    uint32_t levels,
    const Sampling& sampling,
    const Rois& table,
    int64_t begin,
    const Fill& fill) {
  constexpr int kSquares = kCellRows * kCellColumns / 4;
  static_assert(kSquares * kTileChannels / 4 == kThreads);
  __shared__ BinTile<float> bins;
  __shared__ CellWeights<float> weights;

  const TileOfBlock block(sampling, gradients.channels);
  const int64_t row = begin + block.roi;
  const SampledRoi<float>& roi = static_cast<const SampledRoi<float>*>(table.rois)[row];
  const CellRange touched = table.touched[row];
  if (!(levels >> roi.level & 1) || touched.top >= touched.bottom ||
      touched.left >= touched.right) {
    return;
  }
  fill(row, roi, block.range, bins);

  const RoiMap& map = gradients.maps[roi.level];
  float* const data = static_cast<float*>(map.numbers.data);
  const int64_t height = sampling.heights[roi.level], width = sampling.widths[roi.level];
  const int thread = threadIdx.x;
  const int square = map.channels_last ? thread / (kThreads / kSquares) : thread % kSquares;
  const int channel = (map.channels_last ? thread % (kThreads / kSquares) : thread / kSquares) * 4;
  const int own_row = square / (kCellColumns / 4), own_column = square % (kCellColumns / 4) * 4;
  const int count = min(4, block.range.channels - channel);
  const bool whole_rows = width % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const int64_t first_channel = block.range.channel + channel;

  for (int top = touched.top / kCellRows * kCellRows; top < touched.bottom; top += kCellRows) {
    for (int left = touched.left / kCellColumns * kCellColumns; left < touched.right;
         left += kCellColumns) {
      weights.build(roi, sampling, block.range, top, left);
      __syncthreads(); // also after fill
      const unsigned row_bins = weights.row_bins[own_row];
      unsigned column_bins = 0;
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        column_bins |= weights.column_bins[own_column + x];
      }
      if (row_bins != 0 && column_bins != 0 && count > 0) {
        float sums[4][4] = {}; // [cell][channel]
#pragma unroll 1
        for (unsigned p = row_bins; p != 0; p &= p - 1) {
          const int bin_y = __ffs(p) - 1;
#pragma unroll 1
          for (unsigned q = column_bins; q != 0; q &= q - 1) {
            const int bin_x = __ffs(q) - 1;
            const Pack<float, 4> values = load_pack<float, 4>(bins.at(bin_y, bin_x, channel));
#pragma unroll
            for (int x = 0; x < 4; ++x) {
              const float of_column = weights.columns[own_column + x][bin_x];
              const float weight = weights.rows[own_row][bin_y] * of_column;
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                // A bin that is not finite reaches only the cells that it has weight in.
                sums[x][k] += of_column != 0 ? weight * values.values[k] : 0.0f;
              }
            }
          }
        }
        const int64_t y = top + own_row, x = left + own_column;
        if (map.channels_last) {
          float* cell =
              data + ((roi.image * height + y) * width + x) * gradients.channels + first_channel;
#pragma unroll
          for (int i = 0; i < 4; ++i, cell += gradients.channels) {
            if (weights.column_bins[own_column + i] == 0) {
              continue;
            }
            if (map.packs) {
              add_four(cell, sums[i]);
            } else {
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                if (k < count) {
                  atomicAdd(cell + k, sums[i][k]);
                }
              }
            }
          }
        } else {
          float* cell =
              data + ((roi.image * gradients.channels + first_channel) * height + y) * width + x;
#pragma unroll
          for (int k = 0; k < 4; ++k, cell += height * width) {
            const float values[4] = {sums[0][k], sums[1][k], sums[2][k], sums[3][k]};
            if (k >= count) {
              continue;
            }
            if (whole_rows) {
              add_four(cell, values);
            } else {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                if (weights.column_bins[own_column + i] != 0) {
                  atomicAdd(cell + i, values[i]);
                }
              }
            }
          }
        }
      }
      __syncthreads(); // the weights have been read
    }
  }
}

} // namespace hkd
