// Temperature-scaled KL divergence on the CPU, forward and backward.
//
// Classes are computed in float (double for double logits), sums in double. Threads take blocks of
// rows whose size depends on the shape alone, and the blocks' sums are added in order, so the
// result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "hkd/kl_distillation.h"

namespace hkd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kElementsPerBlock = 8192;

struct Rows {
  int64_t count;
  int64_t classes;
  int64_t per_block;
  int64_t blocks;

  explicit Rows(const Tensor& logits)
      : count(logits.size(0)),
        classes(logits.size(1)),
        per_block(std::max<int64_t>(1, kElementsPerBlock / std::max<int64_t>(1, classes))),
        blocks((count + per_block - 1) / per_block) {
  }

  // Calls body(block, first row, last row + 1) for every block, in parallel.
  template <typename Body>
  void for_each_block(const Body& body) const {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        body(block, block * per_block, std::min(count, (block + 1) * per_block));
      }
    });
  }
};

void check_arguments(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weights) {
  STD_TORCH_CHECK(student.dim() == 2, "student_logits must have shape (R, K).");
  STD_TORCH_CHECK(
      teacher.dim() == 2 && teacher.size(0) == student.size(0) &&
          teacher.size(1) == student.size(1),
      "teacher_logits must have the shape of student_logits.");
  STD_TORCH_CHECK(
      teacher.is_cpu() && (!weights || weights->is_cpu()), "Every tensor must be on the CPU.");
  STD_TORCH_CHECK(
      !weights || (weights->dim() == 1 && weights->size(0) == student.size(0) &&
                   weights->scalar_type() == accumulate_type(student.scalar_type())),
      "weights must have shape (R,) and be float32, float64 where student_logits is float64.");
}

// max(sum of the weights, 1); rows weigh 1 each where there are none.
template <typename Acc>
double normalizer(const Acc* weights, int64_t rows) {
  if (weights == nullptr) {
    return std::max<double>(rows, 1);
  }
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    sum += weights[r];
  }
  return sum < 1 ? 1 : sum; // keeps NaN
}

Tensor kl_distillation_loss_cpu(
    const Tensor& student_logits,
    const Tensor& teacher_logits,
    std::optional<Tensor> row_weights,
    double temperature,
    bool sigmoid) {
  check_arguments(student_logits, teacher_logits, row_weights);
  const Rows rows(student_logits);
  const Tensor student = torch::stable::contiguous(student_logits);
  const Tensor teacher = torch::stable::contiguous(teacher_logits);
  const std::optional<Tensor> weights =
      row_weights ? std::make_optional(torch::stable::contiguous(*row_weights)) : std::nullopt;
  Tensor loss = torch::stable::new_empty(student, {}, accumulate_type(student.scalar_type()));

  dispatch_floating(student.scalar_type(), "student_logits", [&](auto s) {
    dispatch_floating(teacher.scalar_type(), "teacher_logits", [&](auto t) {
      using S = decltype(s);
      using T = decltype(t);
      using Acc = accumulate_t<S>;
      const S* s_rows = student.const_data_ptr<S>();
      const T* t_rows = teacher.const_data_ptr<T>();
      const Acc* w = weights ? weights->const_data_ptr<Acc>() : nullptr;
      const Acc tau = static_cast<Acc>(temperature);
      std::vector<double> sums(rows.blocks);
      rows.for_each_block([&](int64_t block, int64_t begin, int64_t end) {
        double sum = 0;
        for (int64_t r = begin; r < end; ++r) {
          const S* x = s_rows + r * rows.classes;
          const T* y = t_rows + r * rows.classes;
          const double kl = sigmoid ? sigmoid_kl<Acc, double>(x, y, rows.classes, tau)
                                    : softmax_kl<Acc, double>(x, y, rows.classes, tau);
          sum += w ? w[r] * kl : kl;
        }
        sums[block] = sum;
      });
      double total = 0;
      for (const double sum : sums) {
        total += sum;
      }
      *loss.mutable_data_ptr<Acc>() =
          static_cast<Acc>(temperature * temperature * total / normalizer(w, rows.count));
    });
  });
  return loss;
}

Tensor kl_distillation_loss_backward_cpu(
    const Tensor& grad,
    const Tensor& student_logits,
    const Tensor& teacher_logits,
    std::optional<Tensor> row_weights,
    double temperature,
    bool sigmoid) {
  check_arguments(student_logits, teacher_logits, row_weights);
  STD_TORCH_CHECK(
      grad.is_cpu() && grad.numel() == 1 &&
          grad.scalar_type() == accumulate_type(student_logits.scalar_type()),
      "grad must be one number on the CPU in the dtype of the loss.");
  const Rows rows(student_logits);
  const Tensor student = torch::stable::contiguous(student_logits);
  const Tensor teacher = torch::stable::contiguous(teacher_logits);
  const std::optional<Tensor> weights =
      row_weights ? std::make_optional(torch::stable::contiguous(*row_weights)) : std::nullopt;
  Tensor gradient = torch::stable::new_empty(student, {rows.count, rows.classes});

  dispatch_floating(student.scalar_type(), "student_logits", [&](auto s) {
    dispatch_floating(teacher.scalar_type(), "teacher_logits", [&](auto t) {
      using S = decltype(s);
      using T = decltype(t);
      using Acc = accumulate_t<S>;
      const S* s_rows = student.const_data_ptr<S>();
      const T* t_rows = teacher.const_data_ptr<T>();
      S* g_rows = gradient.mutable_data_ptr<S>();
      const Acc* w = weights ? weights->const_data_ptr<Acc>() : nullptr;
      const Acc tau = static_cast<Acc>(temperature);
      const double scale = *grad.const_data_ptr<Acc>() * temperature / normalizer(w, rows.count);
      rows.for_each_block([&](int64_t, int64_t begin, int64_t end) {
        std::vector<Acc> scratch(sigmoid ? 0 : 2 * rows.classes);
        for (int64_t r = begin; r < end; ++r) {
          const S* x = s_rows + r * rows.classes;
          const T* y = t_rows + r * rows.classes;
          S* g = g_rows + r * rows.classes;
          const Acc row_scale = static_cast<Acc>(w ? scale * w[r] : scale);
          if (sigmoid) {
            sigmoid_kl_backward<Acc>(x, y, g, rows.classes, tau, row_scale);
          } else {
            softmax_kl_backward<Acc, double>(x, y, g, scratch.data(), rows.classes, tau, row_scale);
          }
        }
      });
    });
  });
  return gradient;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, CPU, m) {
  m.impl("kl_distillation_loss", TORCH_BOX(&kl_distillation_loss_cpu));
  m.impl("kl_distillation_loss_backward", TORCH_BOX(&kl_distillation_loss_backward_cpu));
}

} // namespace hkd
