// The CUDA kernels of logit distillation as their callers see them. Needs no torch header.
//
// One launch goes over a list of tensors. A block takes a fixed stretch of one of them and leaves a
// pair of sums; finish_loss adds those in order. So a forward is two launches, or one where a
// single block does it all, a backward one; nothing depends on the order in which blocks run, and
// the host never waits.
//
// Acc is the type of the loss: double where `is_double`, otherwise float. Void pointers that are
// not said to be otherwise point to Acc on the device.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "finish_loss.h"
#include "hkd/storage.h"

namespace hkd {

constexpr int kMaxTensors = 32; // of one launch

// One tensor of a list and what belongs to it; `items` are its elements or rows.
struct LogitTensor {
  Numbers student, teacher;
  Numbers gradient;    // backward only
  const bool* ignore;  // adaptive distillation: elements that do not count, or null
  const void* weights; // soft targets: one a row, or null
  int64_t items;
  int32_t first_block;
  bool aligned; // packs of elements may be read at once
};

struct LogitTensors {
  LogitTensor tensors[kMaxTensors];
  int32_t count, blocks;
  int64_t items_per_block, blocks_before; // the last of the launches before
};

// factor * grad / max(denominator, 1)
struct GradientScale {
  double factor;
  const void* grad;
  DeviceNumber denominator;
};

// Pairs: sum of the losses, sum of q^theta.
constexpr int64_t kElementsPerBlock = 4096;
struct AdaptiveOptions {
  double gamma, alpha, beta_c, theta;
  bool kl, normalized;
};
void adaptive_distillation(
    const LogitTensors& tensors,
    const AdaptiveOptions& options,
    const LossSums& sums,
    bool is_double,
    cudaStream_t stream);
void adaptive_distillation_backward(
    const LogitTensors& tensors,
    const AdaptiveOptions& options,
    const GradientScale& scale,
    bool is_double,
    cudaStream_t stream);

// Pairs: weighted sum of the rows' losses, sum of the rows' weights.
struct SoftTargetOptions {
  int64_t classes; // at least 1
  double temperature;
  bool sigmoid, kl;
  const void* class_weights; // or null
};
int64_t soft_target_rows_per_block(int64_t classes);
void soft_targets(
    const LogitTensors& tensors,
    const SoftTargetOptions& options,
    const LossSums& sums,
    bool is_double,
    cudaStream_t stream);
void soft_targets_backward(
    const LogitTensors& tensors,
    const SoftTargetOptions& options,
    const GradientScale& scale,
    bool is_double,
    cudaStream_t stream);

// Pairs: sum of the errors that count, 0.
struct BoundedDeltas {
  Numbers student, teacher, target;
  Numbers gradient;   // backward only
  int64_t rows, size; // at least 1 each
  bool aligned;
  double margin;
};
int64_t bounded_regression_blocks(const BoundedDeltas& deltas);
void bounded_regression(
    const BoundedDeltas& deltas, const LossSums& sums, bool is_double, cudaStream_t stream);
void bounded_regression_backward(
    const BoundedDeltas& deltas, const GradientScale& scale, bool is_double, cudaStream_t stream);

} // namespace hkd
