// The CUDA kernels of feature imitation as their callers see them. Needs no torch header.
//
// One launch goes over all levels and images. Blocks leave their sums in memory, and a last block
// adds those in order, so nothing depends on the order in which blocks run and the host never waits
// for what only the device knows: the weights of cells, their sum, the active cells.
//
// Acc is the type of the loss: double where `is_double`, otherwise float. Void pointers point to
// Acc on the device. A cell is numbered within its image, or over the images where that is said.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "hkd/distances.h"
#include "hkd/rasterize.h"
#include "hkd/storage.h"

namespace hkd {

constexpr int kMaxLevels = 12; // a table of them is an argument of a kernel, of at most 4 KB
constexpr int kMaxImages = 32; // of one launch that paints boxes

// (N, C, H, W) as stored: NCHW, or channels_last.
struct StoredMap {
  Numbers numbers;
  int32_t channels;
  bool channels_last;
  bool aligned; // four neighbours in memory may be moved at once
};

// The active cells (weight above 0) of a level, in order.
struct CellList {
  const int32_t* cells;  // over the images; null: all
  const int32_t* length; // one number on the device
};

// One level. Optional members have no data.
struct ImitationLevel {
  StoredMap student, teacher;
  Numbers gradient;         // backward; lies as the student's map
  const void* cell_weights; // (N, cells); null where all are 1
  void* coefficients;      // kCosine: (2, N, cells), kPkd: (4, C_t), as the CPU's operator has them
  Numbers channel_weights; // (N, C_t)
  int64_t cells;           // of an image
  int32_t images;
  int32_t channel_lanes; // lanes of a warp that share cells, a power of two
  bool adapted;

  // forward
  const double* painted; // sums of the weights that blocks of cells have painted
  int64_t painted_count; // 0: all cells weigh 1
  void* sums;            // losses that remain to be added; kPkd: one a channel
  int64_t sum_count;
  void* moments; // kPkd: PartialMoments, (parts, C_t)
  int64_t moment_parts;

  // 1x1 adapter
  Numbers weight, bias; // (C_t, C_s), (C_t,)
  CellList active;
  void* weight_sums; // backward: (splits, C_t, C_s), zeros at first
  void* bias_sums;   // backward: (splits, C_t), zeros at first; null without a bias
  int32_t splits;
};

struct ImitationLevels {
  ImitationLevel levels[kMaxLevels];
  int32_t count;
};

// ---------------------------------------------------------------------------- weights of the cells
// One level as boxes are painted on it.
struct PaintedLevel {
  Numbers weights;   // (N, H, W): written
  Numbers attention; // (N, H, W): factors, or no data
  Numbers anchors;   // kFgfi: (A, 2)
  double* sums;      // of weights without attention: (N, painted_blocks(level))
  double* least;     // kFgfi: a number a box of the call, the overlap that is exceeded near it
  double stride;
  int32_t height, width, anchors_count;
};

// The (R, 4) boxes of one image, and those of regions to ignore.
struct PaintedImage {
  Numbers boxes, ignored;
  int32_t count, ignored_count;
  int32_t first; // of its boxes among those of the call
};

struct PaintedLevels {
  PaintedLevel levels[kMaxLevels];
  float log2_strides[kMaxLevels];
  int32_t count;
  CellWeightRule rule;
  bool masked; // otherwise all weigh 1
  bool assign_ignore_all;
};

struct PaintedImages {
  PaintedImage images[kMaxImages];
  int32_t first, count; // images of the call
};

int64_t painted_blocks(const PaintedLevel& level); // of an image
void paint_cells(const PaintedLevels& levels, const PaintedImages& images, cudaStream_t stream);

// Lists the active cells of a level.
struct ListedLevel {
  const void* weights; // (N, cells)
  const void* others;  // (N, cells), or null: count as well
  int64_t cells;       // over the images
  int32_t* blocks;     // listed_blocks(cells) numbers to work in
  int32_t* list;       // room for all cells
  int32_t* length;
};

struct ListedLevels {
  ListedLevel levels[kMaxLevels];
  int32_t count;
};

int64_t listed_blocks(int64_t cells);
void list_cells(const ListedLevels& levels, bool is_double, cudaStream_t stream);

// --------------------------------------------------------------------------------- loss, forward
int64_t channel_lanes(const StoredMap& student, const StoredMap& teacher);

// The numbers that a level's `sums` must hold, and its moments.
int64_t distance_sums(const ImitationLevel& level);
int64_t moment_parts(const ImitationLevel& level);
int64_t adapted_distance_sums(const ImitationLevel& level);
int64_t adapted_moment_parts(const ImitationLevel& level);
constexpr int64_t kNumbersOfMoments = 8; // of one channel in one part

// Levels without an adapter: fill their sums and cosine factors, or their moments for kPkd.
void distances(
    const ImitationLevels& levels, Distance distance, bool is_double, cudaStream_t stream);
// The same for levels with one.
void adapted_distances(
    const ImitationLevels& levels, Distance distance, bool is_double, cudaStream_t stream);

// kPkd: from moments to coefficients and sums.
void correlate(const ImitationLevels& levels, bool is_double, cudaStream_t stream);

// The levels' scales and the loss.
struct LossOfLevels {
  Numbers level_weights; // one a level, or no data
  double* scales;        // one a level
  void* loss;
};
void finish_imitation(
    const ImitationLevels& levels,
    const LossOfLevels& loss,
    Distance distance,
    bool is_double,
    cudaStream_t stream);

// ------------------------------------------------------------------------------------- backward
struct ImitationScale {
  const void* grad;
  const double* scales; // one a level
};

// Gradients of levels without an adapter, and zeros at the inactive cells of the others.
void gradients(
    const ImitationLevels& levels,
    const ImitationScale& scale,
    Distance distance,
    bool is_double,
    cudaStream_t stream);

// Gradients of adapted cells exist for so many cells at a time, whatever the size of the maps, in
// `adapted`: (rows, pitch) numbers, where the pitch is the most channels of a teacher.
int64_t rows_at_once(const ImitationLevels& levels);
int32_t splits_of_weight(const ImitationLevel& level);

// Adds to the gradients of levels with an adapter where cells count, and to the sums of adapters.
void adapted_gradients(
    const ImitationLevels& levels,
    const ImitationScale& scale,
    Distance distance,
    void* adapted,
    int64_t pitch,
    bool is_double,
    cudaStream_t stream);

// Gradients of weights and biases, added up from the sums of the levels that share them.
struct AdapterSums {
  Numbers gradient;
  const void* sums; // (count, size)
  int64_t count, size;
};
void finish_adapters(
    const AdapterSums* adapters, int64_t count, bool is_double, cudaStream_t stream);

} // namespace hkd
