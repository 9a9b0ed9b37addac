// KL divergence and cross-entropy against a teacher's classes on the GPU.
//
// Neighbouring lanes share a row, as many as it has classes (a power of two, at most a warp), and
// meet by shuffles; a block takes the rows of four passes or more. The logits of a row are read
// once from memory and then from the cache: for the maximum, the sums and the gradient.
#include "hkd/soft_targets.h"
#include "logit_distillation/logit_kernels.cuh"

namespace hkd {
namespace {

constexpr int kPasses = 4;

// Calls body(row, whether it is one of the stretch, lane within the row) for each pass; the lanes
// of a warp stay together.
template <typename Body>
__device__ __forceinline__ void for_each_row(
    const LogitTensors& tensors, int lanes, const Body& body) {
  const Stretch stretch(tensors);
  for (int64_t first = stretch.begin; first < stretch.end; first += kThreads / lanes) {
    const int64_t row = first + int(threadIdx.x) / lanes;
    const bool inside = row < stretch.end;
    body(*stretch.tensor, inside ? row : stretch.end - 1, inside, int(threadIdx.x) % lanes);
  }
}

template <typename Acc>
struct Classes {
  int64_t count;
  Acc temperature;
  const Acc* weights; // or null
  int lanes;          // that share a row
  bool kl;

  explicit Classes(const SoftTargetOptions& options)
      : count(options.classes),
        temperature(static_cast<Acc>(options.temperature)),
        weights(static_cast<const Acc*>(options.class_weights)),
        lanes(lanes_of_row(options.classes)),
        kl(options.kl) {
  }

  __device__ __forceinline__ Acc weight(int64_t k) const {
    return weights == nullptr ? Acc(1) : weights[k];
  }
};

// The sums of SoftmaxTerm over a row, in each of its lanes.
template <typename Acc>
struct SoftmaxRow {
  Acc s_max, t_max, s_exp, t_exp, weight, term;

  __device__ __forceinline__
  SoftmaxRow(const LogitTensor& tensor, int64_t first, int lane, const Classes<Acc>& classes)
      : s_max(-INFINITY), t_max(-INFINITY), s_exp(0), t_exp(0), weight(0), term(0) {
    for (int64_t k = lane; k < classes.count; k += classes.lanes) {
      const Acc s = load<Acc>(tensor.student, first + k);
      const Acc t = load<Acc>(tensor.teacher, first + k);
      s_max = s > s_max ? s : s_max;
      t_max = t > t_max ? t : t_max;
    }
    s_max = lane_max(s_max, classes.lanes);
    t_max = lane_max(t_max, classes.lanes);
    for (int64_t k = lane; k < classes.count; k += classes.lanes) {
      const SoftmaxTerm<Acc> at = class_term(tensor, first, k, classes);
      s_exp += at.s_exp;
      t_exp += at.t_exp;
      weight += at.weight;
      term += at.term;
    }
    s_exp = lane_sum(s_exp, classes.lanes);
    t_exp = lane_sum(t_exp, classes.lanes);
    weight = lane_sum(weight, classes.lanes);
    term = lane_sum(term, classes.lanes);
  }

  __device__ __forceinline__ SoftmaxTerm<Acc> class_term(
      const LogitTensor& tensor, int64_t first, int64_t k, const Classes<Acc>& classes) const {
    return SoftmaxTerm<Acc>(
        (load<Acc>(tensor.student, first + k) - s_max) / classes.temperature,
        (load<Acc>(tensor.teacher, first + k) - t_max) / classes.temperature,
        classes.weight(k),
        classes.kl);
  }

  // softmax_row_loss in the precision of the row.
  __device__ __forceinline__ Acc loss(bool kl) const {
    return (term + weight * std::log(kl ? s_exp / t_exp : s_exp)) / t_exp;
  }
};

template <typename Acc, bool kSigmoid>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) soft_targets_kernel(
    const __grid_constant__ LogitTensors tensors, const Classes<Acc> classes, const LossSums sums) {
  Acc sum = 0, total_weight = 0;
  for_each_row(
      tensors, classes.lanes, [&](const LogitTensor& tensor, int64_t row, bool inside, int lane) {
        const int64_t first = row * classes.count;
        Acc loss = 0;
        if (kSigmoid) {
          for (int64_t k = lane; k < classes.count; k += classes.lanes) {
            loss += sigmoid_term<Acc>(
                load<Acc>(tensor.student, first + k) / classes.temperature,
                load<Acc>(tensor.teacher, first + k) / classes.temperature,
                classes.weight(k),
                classes.kl);
          }
          loss = lane_sum(loss, classes.lanes);
        } else {
          loss = SoftmaxRow<Acc>(tensor, first, lane, classes).loss(classes.kl);
        }
        if (inside && lane == 0) {
          const Acc weight =
              tensor.weights == nullptr ? Acc(1) : static_cast<const Acc*>(tensor.weights)[row];
          sum += weight * loss;
          total_weight += weight;
        }
      });
  leave_pair(sum, total_weight, sums, tensors.blocks_before);
}

template <typename Acc, bool kSigmoid>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Acc>) soft_targets_backward_kernel(
    const __grid_constant__ LogitTensors tensors,
    const Classes<Acc> classes,
    const GradientScale gradient_scale) {
  const Acc scale = load<Acc>(gradient_scale);
  for_each_row(
      tensors, classes.lanes, [&](const LogitTensor& tensor, int64_t row, bool inside, int lane) {
        const int64_t first = row * classes.count;
        const Acc row_scale = tensor.weights == nullptr
                                  ? scale
                                  : scale * static_cast<const Acc*>(tensor.weights)[row];
        if (kSigmoid) {
          for (int64_t k = lane; inside && k < classes.count; k += classes.lanes) {
            const Acc difference = sigmoid_difference(
                load<Acc>(tensor.student, first + k) / classes.temperature,
                load<Acc>(tensor.teacher, first + k) / classes.temperature);
            store(tensor.gradient, first + k, row_scale * classes.weight(k) * difference);
          }
          return;
        }
        const SoftmaxRow<Acc> sums(tensor, first, lane, classes);
        const Acc p = sums.weight / (sums.t_exp * sums.s_exp), q = 1 / sums.t_exp;
        for (int64_t k = lane; inside && k < classes.count; k += classes.lanes) {
          const SoftmaxTerm<Acc> at = sums.class_term(tensor, first, k, classes);
          store(tensor.gradient, first + k, row_scale * (at.s_exp * p - at.weight * q));
        }
      });
}

} // namespace

int64_t soft_target_rows_per_block(int64_t classes) {
  return kThreads / lanes_of_row(classes) * kPasses;
}

void soft_targets(
    const LogitTensors& tensors,
    const SoftTargetOptions& options,
    const LossSums& sums,
    bool is_double,
    cudaStream_t stream) {
  dispatch_loss_type(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    with_constant(options.sigmoid, [&](auto sigmoid) {
      HKD_LAUNCH(
          (soft_targets_kernel<Acc, decltype(sigmoid)::value>),
          tensors.blocks,
          kThreads,
          0,
          stream,
          tensors,
          Classes<Acc>(options),
          sums);
    });
  });
}

void soft_targets_backward(
    const LogitTensors& tensors,
    const SoftTargetOptions& options,
    const GradientScale& scale,
    bool is_double,
    cudaStream_t stream) {
  dispatch_loss_type(is_double, [&](auto acc) {
    using Acc = decltype(acc);
    with_constant(options.sigmoid, [&](auto sigmoid) {
      HKD_LAUNCH(
          (soft_targets_backward_kernel<Acc, decltype(sigmoid)::value>),
          tensors.blocks,
          kThreads,
          0,
          stream,
          tensors,
          Classes<Acc>(options),
          scale);
    });
  });
}

} // namespace hkd
