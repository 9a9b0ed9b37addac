// Adaptive distillation on the GPU: a block takes 4096 elements or more, a thread four neighbours
// at a time.
//
// The forward reads each element once for both the losses and the normaliser, the backward computes
// the element again. Both are bound by memory: 8 bytes an element (float) forward, 12 backward.
#include "hkd/adaptive_distillation.h"
#include "logit_distillation/logit_kernels.cuh"

namespace hkd {
namespace {

constexpr int kPack = 4;

// Calls body(index of a pack, elements in it, student's logits, teacher's probabilities) for the
// packs of the calling thread.
template <typename Acc, typename Body>
__device__ __forceinline__ void for_each_pack(const Stretch& stretch, const Body& body) {
  const LogitTensor& tensor = *stretch.tensor;
  for (int64_t i = stretch.begin + threadIdx.x * kPack; i < stretch.end; i += kThreads * kPack) {
    const int64_t count = stretch.end - i;
    Acc x[kPack], q[kPack];
    load(tensor.student, i, count, tensor.aligned, x);
    load(tensor.teacher, i, count, tensor.aligned, q);
    body(i, count, x, q);
  }
}

template <typename Acc, bool kSquare, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) adaptive_kernel(
    const __grid_constant__ LogitTensors tensors,
    const AdaptiveDistillation<Acc> loss,
    const Exponent<Acc> theta,
    const bool normalized,
    const LossSums sums) {
  const Stretch stretch(tensors);
  const bool* ignore = stretch.tensor->ignore;
  Acc sum = 0, mass = 0;
  for_each_pack<Acc>(
      stretch, [&](int64_t i, int64_t count, const Acc(&x)[kPack], const Acc(&q)[kPack]) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          const bool counts = k < count && !(ignore != nullptr && ignore[i + k]);
          const Acc value = adaptive_loss<kSquare, kEntropy>(loss, x[k], q[k]);
          sum += counts ? value : Acc(0);
        }
        if (normalized) {
#pragma unroll
          for (int k = 0; k < kPack; ++k) {
            const Acc value = vector_pow(q[k], theta);
            mass += k < count ? value : Acc(0);
          }
        }
      });
  leave_pair(sum, mass, sums, tensors.blocks_before);
}

template <typename Acc, bool kSquare, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) adaptive_backward_kernel(
    const __grid_constant__ LogitTensors tensors,
    const AdaptiveDistillation<Acc> loss,
    const GradientScale gradient_scale) {
  const Stretch stretch(tensors);
  const LogitTensor& tensor = *stretch.tensor;
  const Acc scale = load<Acc>(gradient_scale);
  for_each_pack<Acc>(
      stretch, [&](int64_t i, int64_t count, const Acc(&x)[kPack], const Acc(&q)[kPack]) {
        Acc gradient[kPack];
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          const bool counts = k < count && !(tensor.ignore != nullptr && tensor.ignore[i + k]);
          const Acc value = scale * adaptive_gradient<kSquare, kEntropy>(loss, x[k], q[k]);
          gradient[k] = counts ? value : Acc(0);
        }
        store(tensor.gradient, i, count, tensor.aligned, gradient);
      });
}

// Calls body(loss, kSquare, kEntropy) with the types and constants that the options ask for.
template <typename Body>
void specialise(const AdaptiveOptions& options, bool is_double, const Body& body) {
  dispatch_loss_type(is_double, [&](auto acc) {
    const AdaptiveDistillation<decltype(acc)> loss(
        options.gamma, options.alpha, options.beta_c, options.kl);
    with_constant(options.gamma == 2, [&](auto square) {
      with_constant(loss.needs_entropy(), [&](auto entropy) { body(loss, square, entropy); });
    });
  });
}

} // namespace

void adaptive_distillation(
    const LogitTensors& tensors,
    const AdaptiveOptions& options,
    const LossSums& sums,
    bool is_double,
    cudaStream_t stream) {
  specialise(options, is_double, [&](const auto& loss, auto square, auto entropy) {
    using Acc = std::decay_t<decltype(loss.gamma)>;
    HKD_LAUNCH(
        (adaptive_kernel<Acc, decltype(square)::value, decltype(entropy)::value>),
        tensors.blocks,
        kThreads,
        0,
        stream,
        tensors,
        loss,
        Exponent<Acc>(options.theta),
        options.normalized,
        sums);
  });
}

void adaptive_distillation_backward(
    const LogitTensors& tensors,
    const AdaptiveOptions& options,
    const GradientScale& scale,
    bool is_double,
    cudaStream_t stream) {
  specialise(options, is_double, [&](const auto& loss, auto square, auto entropy) {
    using Acc = std::decay_t<decltype(loss.gamma)>;
    HKD_LAUNCH(
        (adaptive_backward_kernel<Acc, decltype(square)::value, decltype(entropy)::value>),
        tensors.blocks,
        kThreads,
        0,
        stream,
        tensors,
        loss,
        scale);
  });
}

} // namespace hkd
