// Bounded box regression on the GPU: arguments and results of the kernels.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "logit_distillation/logit_arguments.h"

namespace hkd {
namespace {

struct Boxes {
  Tensor student, teacher, target;
  BoundedDeltas deltas{};

  Boxes(
      const Tensor& student_deltas,
      const Tensor& teacher_deltas,
      const Tensor& target_deltas,
      double margin)
      : student(torch::stable::contiguous(student_deltas)),
        teacher(torch::stable::contiguous(teacher_deltas)),
        target(torch::stable::contiguous(target_deltas)) {
    STD_TORCH_CHECK(student.dim() == 2, "student_deltas must have shape (R, D).");
    check_list("teacher_deltas", {teacher}, {student});
    check_list("target_deltas", {target}, {student});
    deltas.student = numbers_to_read("student_deltas", student);
    deltas.teacher = numbers_to_read("teacher_deltas", teacher);
    deltas.target = numbers_to_read("target_deltas", target);
    deltas.rows = student.size(0);
    deltas.size = student.size(1);
    deltas.margin = margin;
    deltas.aligned = starts_at_16_bytes(deltas.student.data) &&
                     starts_at_16_bytes(deltas.teacher.data) &&
                     starts_at_16_bytes(deltas.target.data);
  }

  bool empty() const {
    return deltas.rows == 0 || deltas.size == 0;
  }
};

DeviceNumber denominator(
    const std::optional<Tensor>& normalizer, double value, const Tensor& student) {
  return normalizer ? number("normalizer", *normalizer, student) : number(value);
}

Tensor bounded_regression_loss_cuda(
    const Tensor& student_deltas,
    const Tensor& teacher_deltas,
    const Tensor& target_deltas,
    double margin,
    std::optional<Tensor> normalizer,
    double number) {
  const Boxes boxes(student_deltas, teacher_deltas, target_deltas, margin);
  const DeviceCall call(boxes.student);
  const bool in_double = is_double(boxes.student);
  const int64_t blocks = boxes.empty() ? 0 : bounded_regression_blocks(boxes.deltas);
  Tensor loss = empty_loss(boxes.student);
  LossSums sums{};
  sums.scale = 1;
  sums.denominator = denominator(normalizer, number, boxes.student);
  sums.loss = loss.mutable_data_ptr();
  const Tensor pairs = sum_pairs(boxes.student, blocks, &sums);
  if (blocks > 0) {
    bounded_regression(boxes.deltas, sums, in_double, call.stream());
  }
  if (!sums.by_one_block()) {
    finish_loss(sums, in_double, call.stream());
  }
  return loss;
}

Tensor bounded_regression_loss_backward_cuda(
    const Tensor& grad,
    const Tensor& student_deltas,
    const Tensor& teacher_deltas,
    const Tensor& target_deltas,
    double margin,
    std::optional<Tensor> normalizer,
    double number) {
  Boxes boxes(student_deltas, teacher_deltas, target_deltas, margin);
  const DeviceCall call(boxes.student);
  Tensor gradient =
      torch::stable::new_empty(student_deltas, {boxes.deltas.rows, boxes.deltas.size});
  boxes.deltas.gradient = numbers_to_write(gradient);
  boxes.deltas.aligned = boxes.deltas.aligned && starts_at_16_bytes(gradient.const_data_ptr());
  const GradientScale scale =
      gradient_scale(grad, boxes.student, 2, denominator(normalizer, number, boxes.student));
  if (!boxes.empty()) {
    bounded_regression_backward(boxes.deltas, scale, is_double(boxes.student), call.stream());
  }
  return gradient;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, HKD_DEVICE, m) {
  m.impl("bounded_regression_loss", TORCH_BOX(&bounded_regression_loss_cuda));
  m.impl("bounded_regression_loss_backward", TORCH_BOX(&bounded_regression_loss_backward_cuda));
}

} // namespace hkd
