// Mask weights of cells, painted from boxes on the GPU, and lists of the active cells.
//
// A block takes 256 cells of an image. Its threads first find, a box each, which cells a box covers
// on the level; then each goes over these rectangles for its cell. FGFI's rule needs the best
// overlap of any anchor with a box before that; overlaps are separable, so a warp finds it from the
// rows and columns.
#include "feature_imitation/imitation_kernels.cuh"
#include "hkd/box_levels.h"

namespace hkd {
namespace {

// A box as the cells of a level see it: a rectangle, empty where the box is on another level.
struct PaintedBox {
  double x1, y1, x2, y2; // kFgfi
  double least;          // kFgfi
  int32_t top, bottom, left, right;
  float weight;
};

template <typename T>
__device__ __forceinline__ Box<T> load_box(const Numbers& boxes, int64_t index) {
  return {
      load<T>(boxes, 4 * index),
      load<T>(boxes, 4 * index + 1),
      load<T>(boxes, 4 * index + 2),
      load<T>(boxes, 4 * index + 3)};
}

template <typename T>
__device__ __forceinline__ bool is_on_level(
    const PaintedLevels& table, int level, bool on_all_levels, const Box<T>& box) {
  return !box.has_nan() && (on_all_levels || box_level(
                                                 static_cast<float>(box.x1),
                                                 static_cast<float>(box.y1),
                                                 static_cast<float>(box.x2),
                                                 static_cast<float>(box.y2),
                                                 table.log2_strides,
                                                 table.count) == level);
}

// `rule` is kFgfi where the box covers cells by anchors.
template <typename T>
__device__ __forceinline__ PaintedBox painted_box(
    const PaintedLevels& table,
    int l,
    const Numbers& boxes,
    int64_t index,
    Rasterize rule,
    bool on_all_levels) {
  const PaintedLevel& level = table.levels[l];
  const Box<T> box = load_box<T>(boxes, index);
  PaintedBox painted{};
  if (!is_on_level(table, l, on_all_levels, box)) {
    return painted;
  }
  painted.weight = table.rule.foreground;
  if (rule == Rasterize::kFgfi) {
    painted.x1 = box.x1;
    painted.y1 = box.y1;
    painted.x2 = box.x2;
    painted.y2 = box.y2;
    painted.bottom = level.height;
    painted.right = level.width;
    return painted;
  }
  const T stride = static_cast<T>(level.stride);
  const CellSpan<T> x = cell_span(box.x1, box.x2, stride, rule);
  const CellSpan<T> y = cell_span(box.y1, box.y2, stride, rule);
  if (table.rule.per_area) {
    const T area = (y.high - y.low) * (x.high - x.low);
    painted.weight *= static_cast<float>(1 / area);
  }
  int64_t top, bottom, left, right;
  y.clip(level.height, top, bottom);
  x.clip(level.width, left, right);
  painted.top = static_cast<int32_t>(top);
  painted.bottom = static_cast<int32_t>(bottom);
  painted.left = static_cast<int32_t>(left);
  painted.right = static_cast<int32_t>(right);
  return painted;
}

// Whether an anchor of the cell overlaps the box by more than its least share.
template <typename T>
__device__ __forceinline__ bool is_near(
    const PaintedLevel& level,
    const CellWeightRule& rule,
    const PaintedBox& painted,
    int64_t row,
    int64_t column) {
  const Box<T> box = {
      static_cast<T>(painted.x1),
      static_cast<T>(painted.y1),
      static_cast<T>(painted.x2),
      static_cast<T>(painted.y2)};
  const T stride = static_cast<T>(level.stride), offset = static_cast<T>(rule.anchor_offset);
  const T across = box.x2 - box.x1, down = box.y2 - box.y1;
  const T box_area = (across > 0 ? across : T(0)) * (down > 0 ? down : T(0));
  for (int64_t a = 0; a < level.anchors_count; ++a) {
    const T width = load<T>(level.anchors, 2 * a), height = load<T>(level.anchors, 2 * a + 1);
    const T overlap_y = anchor_overlap(box.y1, box.y2, row, offset, stride, height);
    const T overlap_x = anchor_overlap(box.x1, box.x2, column, offset, stride, width);
    if (overlap_y > 0 && overlap_ratio(overlap_y, overlap_x, width * height, box_area) >
                             static_cast<T>(painted.least)) {
      return true;
    }
  }
  return false;
}

// One warp a box, image and level: the share of the best overlap of any anchor with the box.
template <typename T>
__device__ __forceinline__ void find_least(
    const PaintedLevel& level,
    const CellWeightRule& rule,
    const PaintedImage& image,
    int64_t index) {
  const Box<T> box = load_box<T>(image.boxes, index);
  const T stride = static_cast<T>(level.stride), offset = static_cast<T>(rule.anchor_offset);
  const T across = box.x2 - box.x1, down = box.y2 - box.y1;
  const T box_area = (across > 0 ? across : T(0)) * (down > 0 ? down : T(0));
  T best = 0;
  for (int64_t a = 0; a < level.anchors_count; ++a) {
    const T width = load<T>(level.anchors, 2 * a), height = load<T>(level.anchors, 2 * a + 1);
    T most_across = 0, most_down = 0;
    for (int j = threadIdx.x; j < level.width; j += 32) {
      const T overlap = anchor_overlap(box.x1, box.x2, j, offset, stride, width);
      most_across = overlap > most_across ? overlap : most_across;
    }
    for (int i = threadIdx.x; i < level.height; i += 32) {
      const T overlap = anchor_overlap(box.y1, box.y2, i, offset, stride, height);
      most_down = overlap > most_down ? overlap : most_down;
    }
    const T ratio =
        overlap_ratio(lane_max(most_down), lane_max(most_across), width * height, box_area);
    best = ratio > best ? ratio : best;
  }
  if (threadIdx.x == 0) {
    level.least[image.first + index] = static_cast<T>(rule.anchor_threshold) * best;
  }
}

__global__ void __launch_bounds__(32)
    nearest_anchor_kernel(const __grid_constant__ PaintedLevels table, const PaintedImages images) {
  const PaintedImage& image = images.images[blockIdx.y];
  const PaintedLevel& level = table.levels[blockIdx.z];
  if (int(blockIdx.x) < image.count) {
    if (image.boxes.storage == Storage::kDouble) {
      find_least<double>(level, table.rule, image, blockIdx.x);
    } else {
      find_least<float>(level, table.rule, image, blockIdx.x);
    }
  }
}

// Calls visit(box) for the boxes that cover the thread's cell. All threads of a block take part.
template <typename Visit>
__device__ __forceinline__ void visit_boxes(
    const PaintedLevels& table,
    int l,
    const PaintedImage& image,
    bool ignored,
    int32_t row,
    int32_t column,
    PaintedBox* painted,
    const Visit& visit) {
  const PaintedLevel& level = table.levels[l];
  const Numbers& boxes = ignored ? image.ignored : image.boxes;
  const int32_t count = ignored ? image.ignored_count : image.count;
  const bool in_double = boxes.storage == Storage::kDouble;
  // A region to ignore is no object, so FGFI's anchors say nothing about it.
  const bool anchors = table.rule.rasterize == Rasterize::kFgfi && !ignored;
  const Rasterize rule = table.rule.rasterize == Rasterize::kFgfi && ignored ? Rasterize::kCells
                                                                             : table.rule.rasterize;
  const bool on_all_levels = ignored && table.assign_ignore_all;
  for (int32_t first = 0; first < count; first += kThreads) {
    const int32_t own = first + int32_t(threadIdx.x);
    if (own < count) {
      PaintedBox box = in_double ? painted_box<double>(table, l, boxes, own, rule, on_all_levels)
                                 : painted_box<float>(table, l, boxes, own, rule, on_all_levels);
      box.least = anchors ? level.least[image.first + own] : 0;
      painted[threadIdx.x] = box;
    }
    __syncthreads();
    const int32_t here = count - first < kThreads ? count - first : kThreads;
    for (int32_t b = 0; b < here; ++b) {
      const PaintedBox& box = painted[b];
      const bool inside =
          row >= box.top && row < box.bottom && column >= box.left && column < box.right;
      if (inside &&
          (!anchors || (in_double ? is_near<double>(level, table.rule, box, row, column)
                                  : is_near<float>(level, table.rule, box, row, column)))) {
        visit(box);
      }
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, 2) cell_weights_kernel(
    const __grid_constant__ PaintedLevels table,
    const __grid_constant__ PaintedImages images,
    const __grid_constant__ BlocksOfLevels blocks) {
  __shared__ PaintedBox painted[kThreads];
  const int l = blocks.level(blockIdx.x);
  const PaintedLevel& level = table.levels[l];
  const int64_t cells = int64_t(level.height) * level.width;
  const int64_t blocks_of_image = (cells + kThreads - 1) / kThreads;
  const int64_t local = blockIdx.x - blocks.first[l];
  const int64_t image = local / blocks_of_image, block = local % blocks_of_image;
  const int64_t cell = block * kThreads + threadIdx.x;
  const int32_t row = static_cast<int32_t>(cell / level.width);
  const int32_t column = static_cast<int32_t>(cell % level.width);

  float weight = 1;
  if (table.masked) {
    weight = -1; // under no box
    const bool anchors = table.rule.rasterize == Rasterize::kFgfi;
    visit_boxes(
        table, l, images.images[image], false, row, column, painted, [&](const PaintedBox& box) {
          weight = anchors || box.weight > weight ? box.weight : weight;
        });
    visit_boxes(table, l, images.images[image], true, row, column, painted, [&](const PaintedBox&) {
      weight = weight < 0 ? 0.0f : weight;
    });
    weight = weight < 0 ? table.rule.background : weight;
  }
  const int64_t index = (images.first + image) * cells + cell;
  double sums[1] = {cell < cells ? weight : 0.0};
  if (cell < cells) {
    const double factor =
        level.attention.data != nullptr ? load<double>(level.attention, index) : 1.0;
    store(level.weights, index, weight * factor);
  }
  block_sums<kThreads>(sums);
  if (threadIdx.x == 0) {
    level.sums[(images.first + image) * blocks_of_image + block] = sums[0];
  }
}

// -------------------------------------------------------------------------------- active cells
template <typename Acc>
__device__ __forceinline__ bool counts(const ListedLevel& level, int64_t cell) {
  return cell < level.cells &&
         (static_cast<const Acc*>(level.weights)[cell] != 0 ||
          (level.others != nullptr && static_cast<const Acc*>(level.others)[cell] != 0));
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) count_cells_kernel(
    const __grid_constant__ ListedLevels table, const __grid_constant__ BlocksOfLevels blocks) {
  const int l = blocks.level(blockIdx.x);
  const int64_t block = blockIdx.x - blocks.first[l];
  int sums[1] = {counts<Acc>(table.levels[l], block * kThreads + threadIdx.x)};
  block_sums<kThreads>(sums);
  if (threadIdx.x == 0) {
    table.levels[l].blocks[block] = sums[0];
  }
}

// A block adds up what the blocks before it have counted.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) list_cells_kernel(
    const __grid_constant__ ListedLevels table, const __grid_constant__ BlocksOfLevels blocks) {
  __shared__ int of_warps[kWarps];
  const int l = blocks.level(blockIdx.x);
  const ListedLevel& level = table.levels[l];
  const int64_t block = blockIdx.x - blocks.first[l];
  const int64_t cell = block * kThreads + threadIdx.x;
  int before[1] = {0};
  for (int64_t i = threadIdx.x; i < block; i += kThreads) {
    before[0] += level.blocks[i];
  }
  const bool own = counts<Acc>(level, cell);
  const unsigned votes = __ballot_sync(kAllLanes, own);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) {
    of_warps[warp] = __popc(votes);
  }
  block_sums<kThreads>(before); // its barrier is that of `of_warps`
  int place = before[0] + __popc(votes & ((1u << lane) - 1));
  for (int w = 0; w < warp; ++w) {
    place += of_warps[w];
  }
  if (own) {
    level.list[place] = static_cast<int32_t>(cell);
  }
  if (cell == (level.cells + kThreads - 1) / kThreads * kThreads - 1) { // the last thread of all
    *level.length = place + own;
  }
}

} // namespace

int64_t painted_blocks(const PaintedLevel& level) {
  return divided_up(int64_t(level.height) * level.width, kThreads);
}

void paint_cells(const PaintedLevels& levels, const PaintedImages& images, cudaStream_t stream) {
  int32_t most = 0;
  for (int i = 0; i < images.count; ++i) {
    most = images.images[i].count > most ? images.images[i].count : most;
  }
  if (levels.rule.rasterize == Rasterize::kFgfi && most > 0) {
    HKD_LAUNCH(
        nearest_anchor_kernel,
        dim3(most, images.count, levels.count),
        32,
        0,
        stream,
        levels,
        images);
  }
  const BlocksOfLevels blocks = blocks_of_levels(
      levels, [&](const PaintedLevel& level) { return images.count * painted_blocks(level); });
  if (blocks.total() > 0) {
    HKD_LAUNCH(cell_weights_kernel, blocks.total(), kThreads, 0, stream, levels, images, blocks);
  }
}

int64_t listed_blocks(int64_t cells) {
  return divided_up(cells, kThreads);
}

void list_cells(const ListedLevels& levels, bool is_double, cudaStream_t stream) {
  const BlocksOfLevels blocks =
      blocks_of_levels(levels, [](const ListedLevel& level) { return listed_blocks(level.cells); });
  if (blocks.total() == 0) {
    return;
  }
  dispatch_loss_type(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    HKD_LAUNCH(count_cells_kernel<Acc>, blocks.total(), kThreads, 0, stream, levels, blocks);
    HKD_LAUNCH(list_cells_kernel<Acc>, blocks.total(), kThreads, 0, stream, levels, blocks);
  });
}

} // namespace hkd
