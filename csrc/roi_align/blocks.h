// How the threads share boxes, channels and rows of the maps.
//
// No two threads add to one number, and boxes are added in their order, so that no result depends
// on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.h"
#include "roi_align/pooling.h"

namespace hkd {

// Boxes that are pooled and then scattered together: their bins, 50 kB a box of 7x7 bins and 256
// channels, stay in the caches in between.
constexpr int64_t kBoxesPerBlock = 8;

// Some boxes, of one level and image where it matters.
struct RoiBlock {
  int level;
  int64_t begin, count;
};

// The boxes of a call, in the order of make_rois, with their weights.
template <typename Acc>
class RoiBlocks {
 public:
  // With `gradient` there can be scattered as well as pooled.
  RoiBlocks(
      const std::vector<torch::stable::Tensor>& boxes,
      const RoiOptions& options,
      const std::vector<MapShape>& shapes,
      bool gradient)
      : rows_(options.rows),
        columns_(options.columns),
        rois_(make_rois<Acc>(boxes, options.strides)),
        weights_(rois_.size()),
        scratch_(torch::stable::get_num_threads()) {
    constexpr int64_t kGrain = 64;
    torch::stable::parallel_for(0, count(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const MapShape& map = shapes[rois_[i].level];
        weights_[i].build(rois_[i], options, map.height, map.width, gradient);
      }
    });
  }

  int64_t count() const {
    return static_cast<int64_t>(rois_.size());
  }
  RoiBlock all() const {
    return {-1, 0, count()};
  }
  const BoxWeights<Acc>& weights(int64_t box) const {
    return weights_[box];
  }
  int level(int64_t box) const {
    return rois_[box].level;
  }
  // The row of the pooled tensor that a box fills.
  int64_t row(int64_t box) const {
    return rois_[box].row;
  }

  // Calls body(block) for blocks of at most `size` boxes.
  template <typename Body>
  void for_each(int64_t size, const Body& body) const {
    split(all(), size, body);
  }

  // Calls body(piece, scratch) for every box and channel of a block, in parallel. Of NHWC maps a
  // piece has every channel, which are contiguous. Of NCHW maps it has few, and the boxes follow
  // each other, so that these planes stay in the caches. Values are the worker's, and not set.
  template <typename Body>
  void for_each_piece(
      const RoiBlock& block, bool channels_last, int64_t channels, const Body& body) {
    const int64_t step = channels_last ? std::max<int64_t>(channels, 1) : kPlanes;
    const int64_t boxes = channels_last ? kBoxesOfCells : kBoxesOfPlanes;
    const int64_t steps = (channels + step - 1) / step, runs = (block.count + boxes - 1) / boxes;
    for_each_worker(runs * steps, [&](int64_t worker, const auto& next) {
      for (int64_t unit = next(); unit >= 0; unit = next()) {
        const int64_t first = unit / runs * step, run = unit % runs * boxes;
        const int64_t end = std::min(block.count, run + boxes);
        for (int64_t i = run; i < end; ++i) {
          const int64_t size = std::min(step, channels - first);
          body(own_piece(block.begin + i, first, size, !channels_last, worker), scratch_[worker]);
        }
      }
    });
  }

  // Adds to the gradients what produce(piece, scratch) sets the values of a piece to, for the boxes
  // of `range` whose level `take(level)` accepts.
  //
  // One parallel region for everything. Planes: a worker owns channels, and goes through the boxes.
  // Cells: a worker produces some boxes of a block with every channel, or scatters to a band of
  // rows the block before; two blocks are under way, and a worker waits only where another lags
  // behind by a block. (Owning channels of cells needs no waiting and is half as fast: memory is
  // worst at a few channels of each of many cells.)
  template <typename Take, typename Produce>
  void scatter(
      const RoiBlock& range,
      const std::vector<FeatureMap<Acc>>& gradients,
      const Take& take,
      const Produce& produce) {
    struct Unit {
      enum { kPlanes, kProduce, kScatter } kind;
      int64_t block, index;
    };
    std::vector<RoiBlock> planes;
    std::vector<CellBlock> cells;
    std::vector<Unit> units;
    const int64_t channels = gradients[0].channels;
    split(range, range.count, [&](const RoiBlock& block) {
      if (take(block.level) && !gradients[block.level].channels_last) {
        planes.push_back(block);
        for (int64_t i = 0; i * kPlanes < channels; ++i) {
          units.push_back({Unit::kPlanes, static_cast<int64_t>(planes.size()) - 1, i});
        }
      }
    });
    split(range, kBoxesPerBlock, [&](const RoiBlock& block) {
      if (take(block.level) && gradients[block.level].channels_last) {
        const CellBlock shared = cell_block(block);
        // Boxes beside the map are left out: nothing would wait for them before their memory is
        // taken by a later block.
        if (shared.bands > 0) {
          cells.push_back(shared);
        }
      }
    });
    const int64_t blocks = static_cast<int64_t>(cells.size());
    for (int64_t b = 0; b < blocks + 1; ++b) {
      for (int64_t i = 0; b < blocks && i < cells[b].parts; ++i) {
        units.push_back({Unit::kProduce, b, i});
      }
      for (int64_t i = 0; b > 0 && i < cells[b - 1].bands; ++i) {
        units.push_back({Unit::kScatter, b - 1, i});
      }
    }

    const int64_t of_box = rows_ * columns_ * channels, of_block = kBoxesPerBlock * of_box;
    std::vector<Acc> values(std::min<int64_t>(blocks, 2) * of_block);
    std::vector<std::atomic<int64_t>> produced(blocks), scattered(blocks);
    for_each_worker(static_cast<int64_t>(units.size()), [&](int64_t worker, const auto& next) {
      PoolingScratch<Acc>& scratch = scratch_[worker];
      for (int64_t u = next(); u >= 0; u = next()) {
        const Unit& unit = units[u];
        if (unit.kind == Unit::kPlanes) {
          const RoiBlock& block = planes[unit.block];
          const int64_t first = unit.index * kPlanes, size = std::min(kPlanes, channels - first);
          for (int64_t box = block.begin; box < block.begin + block.count; ++box) {
            const Piece<Acc> piece = own_piece(box, first, size, true, worker);
            produce(piece, scratch);
            scatter_planes(weights_[box], gradients[block.level], piece, scratch);
          }
          continue;
        }
        const CellBlock& cell = cells[unit.block];
        const RoiBlock& block = cell.block;
        Acc* of_cells = values.data() + unit.block % 2 * of_block;
        if (unit.kind == Unit::kProduce) {
          if (unit.block >= 2) { // whose memory this block takes
            wait_for(scattered[unit.block - 2], cells[unit.block - 2].bands);
          }
          const int64_t end = std::min(block.count, (unit.index + 1) * kBoxesOfCells);
          for (int64_t i = unit.index * kBoxesOfCells; i < end; ++i) {
            produce(
                Piece<Acc>{
                    block.begin + i,
                    0,
                    channels,
                    rows_,
                    columns_,
                    false,
                    of_cells + i * of_box,
                    channels},
                scratch);
          }
          produced[unit.block].fetch_add(1, std::memory_order_release);
        } else {
          wait_for(produced[unit.block], cell.parts);
          if (unit.block >= 1) { // which adds to the same rows first
            wait_for(scattered[unit.block - 1], cells[unit.block - 1].bands);
          }
          const int begin = cell.first_row + static_cast<int>(unit.index) * cell.rows_of_band;
          const int end = begin + cell.rows_of_band;
          for (int64_t i = 0; i < block.count; ++i) {
            scatter_cells(
                weights_[block.begin + i],
                gradients[block.level],
                begin,
                end,
                of_cells + i * of_box,
                scratch);
          }
          scattered[unit.block].fetch_add(1, std::memory_order_release);
        }
      }
    });
  }

 private:
  static constexpr int64_t kBoxesOfCells = 2; // that a worker takes at a time
  static constexpr int64_t kBoxesOfPlanes = 64;

  // How the work on a block of an NHWC level is shared.
  struct CellBlock {
    RoiBlock block;
    int64_t parts; // of boxes
    int64_t bands; // of rows of the map
    int first_row, rows_of_band;
  };

  CellBlock cell_block(const RoiBlock& block) const {
    constexpr int kBands = 16, kMinRows = 2;
    int first = std::numeric_limits<int>::max(), end = 0;
    for (int64_t i = block.begin; i < block.begin + block.count; ++i) {
      if (weights_[i].rows.cells() > 0) {
        first = std::min(first, weights_[i].rows.first());
        end = std::max(end, weights_[i].rows.end());
      }
    }
    const int extent = std::max(end - first, 0);
    const int rows = std::max(kMinRows, (extent + kBands - 1) / kBands);
    return {
        block,
        (block.count + kBoxesOfCells - 1) / kBoxesOfCells,
        (extent + rows - 1) / rows,
        first,
        rows};
  }

  // A piece whose values are memory of a worker.
  Piece<Acc> own_piece(int64_t box, int64_t first, int64_t count, bool planes, int64_t worker) {
    const int64_t stride = Piece<Acc>::packed_stride(planes, rows_, count);
    Acc* values = reserve(scratch_[worker].values, (planes ? columns_ : rows_ * columns_) * stride);
    return {box, first, count, rows_, columns_, planes, values, stride};
  }

  // Calls body(block) for blocks of at most `size` boxes of one level and image.
  template <typename Body>
  void split(const RoiBlock& range, int64_t size, const Body& body) const {
    const int64_t last = range.begin + range.count;
    for (int64_t begin = range.begin, end; begin < last; begin = end) {
      const Roi<Acc>& first = rois_[begin];
      for (end = begin + 1; end < last && end - begin < size && rois_[end].level == first.level &&
                            rois_[end].image == first.image;) {
        ++end;
      }
      body(RoiBlock{first.level, begin, end - begin});
    }
  }

  int64_t rows_, columns_; // of bins
  std::vector<Roi<Acc>> rois_;
  std::vector<BoxWeights<Acc>> weights_;
  std::vector<PoolingScratch<Acc>> scratch_; // one a worker
};

} // namespace hkd
