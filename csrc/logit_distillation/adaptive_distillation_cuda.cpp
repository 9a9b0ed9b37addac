// Adaptive distillation loss on the GPU: arguments and results of the kernels.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "logit_distillation/logit_arguments.h"

namespace hkd {
namespace {

struct Elements : DenseLists {
  std::vector<LogitTensor> tensors;

  Elements(
      const std::vector<Tensor>& student_logits,
      const std::vector<Tensor>& teacher_probs,
      const std::vector<Tensor>& ignored)
      : DenseLists(student_logits, teacher_probs, ignored) {
    for (size_t i = 0; i < logits.size(); ++i) {
      LogitTensor tensor{};
      tensor.student = numbers_to_read("student_logits", logits[i]);
      tensor.teacher = numbers_to_read("teacher_probs", probs[i]);
      tensor.ignore = mask(i);
      tensor.items = logits[i].numel();
      tensor.aligned =
          starts_at_16_bytes(tensor.student.data) && starts_at_16_bytes(tensor.teacher.data);
      tensors.push_back(tensor);
    }
  }
};

std::tuple<Tensor, Tensor> adaptive_distillation_loss_cuda(
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_probs,
    std::vector<Tensor> ignore,
    double gamma,
    double alpha,
    double beta_c,
    std::optional<double> theta,
    bool kl) {
  const Elements elements(student_logits, teacher_probs, ignore);
  const Tensor& student = student_logits[0];
  const DeviceCall call(student);
  const Launches launches(elements.tensors, kElementsPerBlock);
  const AdaptiveOptions options{gamma, alpha, beta_c, theta.value_or(0), kl, theta.has_value()};
  Tensor loss = empty_loss(student), normalizer = empty_loss(student);
  LossSums sums{};
  sums.scale = 1;
  sums.divide_by_second = theta.has_value();
  sums.denominator = number(1);
  sums.loss = loss.mutable_data_ptr();
  sums.used_denominator = normalizer.mutable_data_ptr();
  launches.finish(student, sums, call.stream(), [&](const LogitTensors& table) {
    adaptive_distillation(table, options, sums, is_double(student), call.stream());
  });
  return {loss, normalizer};
}

std::vector<Tensor> adaptive_distillation_loss_backward_cuda(
    const Tensor& grad,
    const Tensor& normalizer,
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_probs,
    std::vector<Tensor> ignore,
    double gamma,
    double alpha,
    double beta_c,
    bool kl) {
  Elements elements(student_logits, teacher_probs, ignore);
  const Tensor& student = student_logits[0];
  const DeviceCall call(student);
  DenseGradients gradients(student_logits, elements);
  for (size_t i = 0; i < student_logits.size(); ++i) {
    LogitTensor& tensor = elements.tensors[i];
    tensor.gradient = numbers_to_write(gradients.written[i]);
    tensor.aligned = tensor.aligned && starts_at_16_bytes(tensor.gradient.data);
  }
  const GradientScale scale =
      gradient_scale(grad, student, 1, number("normalizer", normalizer, student));
  const AdaptiveOptions options{gamma, alpha, beta_c, 0, kl, false};
  const Launches launches(elements.tensors, kElementsPerBlock);
  for (const LogitTensors& table : launches.tables) {
    adaptive_distillation_backward(table, options, scale, is_double(student), call.stream());
  }
  return gradients.finish();
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, HKD_DEVICE, m) {
  m.impl("adaptive_distillation_loss", TORCH_BOX(&adaptive_distillation_loss_cuda));
  m.impl(
      "adaptive_distillation_loss_backward", TORCH_BOX(&adaptive_distillation_loss_backward_cuda));
}

} // namespace hkd
