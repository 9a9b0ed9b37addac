// KL divergence and cross-entropy against a teacher's classes on the GPU: arguments and results of
// the kernels.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "logit_distillation/logit_arguments.h"

namespace hkd {
namespace {

struct Rows {
  std::vector<Tensor> stored; // keeps copies alive
  std::vector<LogitTensor> tensors;
  int64_t classes = 0, count = 0;
  bool weighted;
  const void* class_weights = nullptr;

  Rows(
      const std::vector<Tensor>& student_logits,
      const std::vector<Tensor>& teacher_logits,
      const std::vector<Tensor>& row_weights,
      const std::optional<Tensor>& weights_of_classes)
      : weighted(!row_weights.empty()) {
    STD_TORCH_CHECK(!student_logits.empty(), "student_logits is an empty list.");
    check_list("student_logits", student_logits, student_logits);
    check_list("teacher_logits", teacher_logits, student_logits);
    STD_TORCH_CHECK(student_logits[0].dim() > 0, "student_logits[0] must have shape (..., K).");
    classes = student_logits[0].size(-1);
    const ScalarType loss_type = accumulate_type(student_logits[0].scalar_type());
    STD_TORCH_CHECK(
        !weighted || row_weights.size() == student_logits.size(),
        "weights must have one tensor for each of student_logits.");
    for (size_t i = 0; i < student_logits.size(); ++i) {
      const Tensor& logits = student_logits[i];
      STD_TORCH_CHECK(
          logits.dim() > 0 && logits.size(-1) == classes,
          "student_logits[",
          i,
          "] must have shape (..., ",
          classes,
          ").");
      LogitTensor tensor{};
      tensor.items = 1;
      for (int64_t axis = 0; axis + 1 < logits.dim(); ++axis) {
        tensor.items *= logits.size(axis);
      }
      tensor.student = numbers_to_read("student_logits", contiguous(logits));
      tensor.teacher = numbers_to_read("teacher_logits", contiguous(teacher_logits[i]));
      if (weighted) {
        const Tensor& weights = row_weights[i];
        STD_TORCH_CHECK(
            same_device(weights, logits) && weights.numel() == tensor.items &&
                weights.scalar_type() == loss_type,
            "weights must be one number a row on the device of the student, in the dtype of the "
            "loss.");
        tensor.weights = contiguous(weights).const_data_ptr();
      }
      count += tensor.items;
      tensors.push_back(tensor);
    }
    if (weights_of_classes) {
      STD_TORCH_CHECK(
          same_device(*weights_of_classes, student_logits[0]) &&
              weights_of_classes->numel() == classes &&
              weights_of_classes->scalar_type() == loss_type,
          "class_weights must be one number a class on the device of the student, in the dtype of "
          "the loss.");
      class_weights = contiguous(*weights_of_classes).const_data_ptr();
    }
    if (classes == 0) {
      tensors.clear();
    }
  }

  Tensor contiguous(const Tensor& tensor) {
    stored.push_back(torch::stable::contiguous(tensor));
    return stored.back();
  }

  Launches launches() const {
    return Launches(tensors, soft_target_rows_per_block(classes));
  }
};

std::tuple<Tensor, Tensor> forward(
    const std::vector<Tensor>& student_logits,
    const std::vector<Tensor>& teacher_logits,
    const std::vector<Tensor>& row_weights,
    const std::optional<Tensor>& class_weights,
    double temperature,
    bool sigmoid,
    bool kl) {
  const Rows rows(student_logits, teacher_logits, row_weights, class_weights);
  const Tensor& student = student_logits[0];
  const DeviceCall call(student);
  const Launches launches = rows.launches();
  const SoftTargetOptions options{rows.classes, temperature, sigmoid, kl, rows.class_weights};
  Tensor loss = empty_loss(student), normalizer = empty_loss(student);
  LossSums sums{};
  sums.scale = temperature * temperature;
  sums.divide_by_second = rows.weighted;
  sums.denominator = number(static_cast<double>(rows.count));
  sums.loss = loss.mutable_data_ptr();
  sums.used_denominator = normalizer.mutable_data_ptr();
  launches.finish(student, sums, call.stream(), [&](const LogitTensors& table) {
    soft_targets(table, options, sums, is_double(student), call.stream());
  });
  return {loss, normalizer};
}

std::vector<Tensor> backward(
    const Tensor& grad,
    const Tensor& normalizer,
    const std::vector<Tensor>& student_logits,
    const std::vector<Tensor>& teacher_logits,
    const std::vector<Tensor>& row_weights,
    const std::optional<Tensor>& class_weights,
    double temperature,
    bool sigmoid,
    bool kl) {
  Rows rows(student_logits, teacher_logits, row_weights, class_weights);
  const Tensor& student = student_logits[0];
  const DeviceCall call(student);
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < student_logits.size(); ++i) {
    gradients.push_back(torch::stable::new_empty(student_logits[i], student_logits[i].sizes()));
    if (i < rows.tensors.size()) {
      rows.tensors[i].gradient = numbers_to_write(gradients[i]);
    }
  }
  const SoftTargetOptions options{rows.classes, temperature, sigmoid, kl, rows.class_weights};
  const GradientScale scale =
      gradient_scale(grad, student, temperature, number("normalizer", normalizer, student));
  for (const LogitTensors& table : rows.launches().tables) {
    soft_targets_backward(table, options, scale, is_double(student), call.stream());
  }
  return gradients;
}

std::tuple<Tensor, Tensor> kl_distillation_loss_cuda(
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_logits,
    std::vector<Tensor> weights,
    double temperature,
    bool sigmoid) {
  return forward(student_logits, teacher_logits, weights, std::nullopt, temperature, sigmoid, true);
}

std::vector<Tensor> kl_distillation_loss_backward_cuda(
    const Tensor& grad,
    const Tensor& normalizer,
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_logits,
    std::vector<Tensor> weights,
    double temperature,
    bool sigmoid) {
  return backward(
      grad,
      normalizer,
      student_logits,
      teacher_logits,
      weights,
      std::nullopt,
      temperature,
      sigmoid,
      true);
}

std::tuple<Tensor, Tensor> soft_cross_entropy_loss_cuda(
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_logits,
    std::vector<Tensor> weights,
    std::optional<Tensor> class_weights,
    double temperature,
    bool sigmoid) {
  return forward(
      student_logits, teacher_logits, weights, class_weights, temperature, sigmoid, false);
}

std::vector<Tensor> soft_cross_entropy_loss_backward_cuda(
    const Tensor& grad,
    const Tensor& normalizer,
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_logits,
    std::vector<Tensor> weights,
    std::optional<Tensor> class_weights,
    double temperature,
    bool sigmoid) {
  return backward(
      grad,
      normalizer,
      student_logits,
      teacher_logits,
      weights,
      class_weights,
      temperature,
      sigmoid,
      false);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, HKD_DEVICE, m) {
  m.impl("kl_distillation_loss", TORCH_BOX(&kl_distillation_loss_cuda));
  m.impl("kl_distillation_loss_backward", TORCH_BOX(&kl_distillation_loss_backward_cuda));
  m.impl("soft_cross_entropy_loss", TORCH_BOX(&soft_cross_entropy_loss_cuda));
  m.impl("soft_cross_entropy_loss_backward", TORCH_BOX(&soft_cross_entropy_loss_backward_cuda));
}

} // namespace hkd
