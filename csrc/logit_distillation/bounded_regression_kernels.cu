// Bounded box regression on the GPU. Neighbouring lanes share a box: one lane where a box is four
// deltas that can be read at once, otherwise a lane a delta. A block takes the boxes of four
// passes.
#include "hkd/bounded_regression.h"
#include "logit_distillation/logit_kernels.cuh"

namespace hkd {
namespace {

constexpr int kPasses = 4;

bool in_packs(const BoundedDeltas& deltas) {
  return deltas.aligned && deltas.size % 4 == 0;
}

int lanes_of_box(const BoundedDeltas& deltas) {
  return lanes_of_row(in_packs(deltas) ? deltas.size / 4 : deltas.size);
}

// Calls body(box, whether there is one, student's squared error or 0 where the box does not count)
// for each pass; the lanes of a warp stay together.
template <int kPack, typename Acc, typename Body>
__device__ __forceinline__ void for_each_box(
    const BoundedDeltas& deltas, int lanes, const Body& body) {
  const int boxes = kThreads / lanes;
  const int lane = int(threadIdx.x) % lanes;
  const Acc margin = static_cast<Acc>(deltas.margin);
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t given = (int64_t(blockIdx.x) * kPasses + pass) * boxes + int(threadIdx.x) / lanes;
    const bool inside = given < deltas.rows;
    const int64_t box = inside ? given : deltas.rows - 1;
    Acc student_error = 0, teacher_error = 0;
    for (int64_t d = lane * kPack; d < deltas.size; d += lanes * kPack) {
      Acc s[kPack], t[kPack], target[kPack];
      load(deltas.student, box * deltas.size + d, kPack, deltas.aligned, s);
      load(deltas.teacher, box * deltas.size + d, kPack, deltas.aligned, t);
      load(deltas.target, box * deltas.size + d, kPack, deltas.aligned, target);
      student_error += squared_error(s, target, kPack);
      teacher_error += squared_error(t, target, kPack);
    }
    student_error = lane_sum(student_error, lanes);
    teacher_error = lane_sum(teacher_error, lanes);
    body(box, inside, lane, student_error, student_error + margin > teacher_error);
  }
}

template <int kPack, typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>)
    bounded_kernel(const BoundedDeltas deltas, int lanes, const LossSums sums) {
  Acc sum = 0;
  for_each_box<kPack, Acc>(
      deltas, lanes, [&](int64_t, bool inside, int lane, Acc error, bool counts) {
        sum += inside && lane == 0 && counts ? error : Acc(0);
      });
  leave_pair(sum, Acc(0), sums);
}

template <int kPack, typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) bounded_backward_kernel(
    const BoundedDeltas deltas, int lanes, const GradientScale gradient_scale) {
  const Acc scale = load<Acc>(gradient_scale);
  for_each_box<kPack, Acc>(
      deltas, lanes, [&](int64_t box, bool inside, int lane, Acc, bool counts) {
        for (int64_t d = lane * kPack; inside && d < deltas.size; d += lanes * kPack) {
          Acc s[kPack], target[kPack], gradient[kPack];
          load(deltas.student, box * deltas.size + d, kPack, deltas.aligned, s);
          load(deltas.target, box * deltas.size + d, kPack, deltas.aligned, target);
#pragma unroll
          for (int k = 0; k < kPack; ++k) {
            gradient[k] = counts ? scale * (s[k] - target[k]) : Acc(0);
          }
          store(deltas.gradient, box * deltas.size + d, kPack, deltas.aligned, gradient);
        }
      });
}

} // namespace

int64_t bounded_regression_blocks(const BoundedDeltas& deltas) {
  const int64_t boxes = kThreads / lanes_of_box(deltas) * kPasses;
  return (deltas.rows + boxes - 1) / boxes;
}

void bounded_regression(
    const BoundedDeltas& deltas, const LossSums& sums, bool is_double, cudaStream_t stream) {
  dispatch_loss_type(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    with_constant(in_packs(deltas), [&](auto packed) {
      HKD_LAUNCH(
          (bounded_kernel < decltype(packed)::value ? 4 : 1, Acc >),
          bounded_regression_blocks(deltas),
          kThreads,
          0,
          stream,
          deltas,
          lanes_of_box(deltas),
          sums);
    });
  });
}

void bounded_regression_backward(
    const BoundedDeltas& deltas, const GradientScale& scale, bool is_double, cudaStream_t stream) {
  dispatch_loss_type(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    with_constant(in_packs(deltas), [&](auto packed) {
      HKD_LAUNCH(
          (bounded_backward_kernel < decltype(packed)::value ? 4 : 1, Acc >),
          bounded_regression_blocks(deltas),
          kThreads,
          0,
          stream,
          deltas,
          lanes_of_box(deltas),
          scale);
    });
  });
}

} // namespace hkd
