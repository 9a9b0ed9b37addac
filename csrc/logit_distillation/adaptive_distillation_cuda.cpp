// Adaptive distillation loss on the GPU: arguments and results of the kernels.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "dense_layout.h"
#include "logit_distillation/logit_arguments.h"

namespace hkd {
namespace {

struct Elements {
  std::vector<Tensor> stored; // keeps copies alive
  std::vector<LogitTensor> tensors;
  std::vector<bool> as_stored;

  Elements(
      const std::vector<Tensor>& student_logits,
      const std::vector<Tensor>& teacher_probs,
      const std::vector<Tensor>& ignored) {
    STD_TORCH_CHECK(!student_logits.empty(), "student_logits is an empty list.");
    check_like("student_logits", student_logits, student_logits);
    check_like("teacher_probs", teacher_probs, student_logits);
    if (!ignored.empty()) {
      check_like("ignore", ignored, student_logits);
    }
    for (size_t i = 0; i < student_logits.size(); ++i) {
      const Tensor& x = student_logits[i];
      const Tensor& q = teacher_probs[i];
      const bool alike =
          is_dense(x) && lie_alike(x, q) && (ignored.empty() || lie_alike(x, ignored[i]));
      const auto readable = [&](const Tensor& tensor) {
        stored.push_back(alike ? tensor : torch::stable::contiguous(tensor));
        return stored.back();
      };
      LogitTensor tensor{};
      tensor.student = numbers_to_read("student_logits", readable(x));
      tensor.teacher = numbers_to_read("teacher_probs", readable(q));
      if (!ignored.empty()) {
        STD_TORCH_CHECK(ignored[i].scalar_type() == ScalarType::Bool, "ignore must be bool.");
        tensor.ignore = readable(ignored[i]).const_data_ptr<bool>();
      }
      tensor.items = x.numel();
      tensor.aligned =
          starts_at_16_bytes(tensor.student.data) && starts_at_16_bytes(tensor.teacher.data);
      tensors.push_back(tensor);
      as_stored.push_back(alike);
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
  const Tensor pairs = launches.pairs(student);
  const AdaptiveOptions options{gamma, alpha, beta_c, theta.value_or(0), kl, theta.has_value()};
  launches.with_pairs(pairs, [&](const LogitTensors& table, void* place) {
    adaptive_distillation(table, options, place, is_double(student), call.stream());
  });
  Tensor loss = empty_loss(student), normalizer = empty_loss(student);
  LossSums sums{};
  sums.pairs = pairs.const_data_ptr();
  sums.count = launches.blocks;
  sums.scale = 1;
  sums.divide_by_second = theta.has_value();
  sums.denominator = number(1);
  sums.loss = loss.mutable_data_ptr();
  sums.used_denominator = normalizer.mutable_data_ptr();
  finish_loss(sums, is_double(student), call.stream());
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
  std::vector<Tensor> gradients, stored;
  for (size_t i = 0; i < student_logits.size(); ++i) {
    const Tensor& x = student_logits[i];
    gradients.push_back(torch::stable::empty_like(x)); // in the layout of x, where that is dense
    const bool direct = elements.as_stored[i] || gradients[i].is_contiguous();
    stored.push_back(direct ? gradients[i] : torch::stable::new_empty(x, x.sizes()));
    LogitTensor& tensor = elements.tensors[i];
    tensor.gradient = numbers_to_write(stored[i]);
    tensor.aligned = tensor.aligned && starts_at_16_bytes(tensor.gradient.data);
  }
  const GradientScale scale =
      gradient_scale(grad, student, 1, number("normalizer", normalizer, student));
  const AdaptiveOptions options{gamma, alpha, beta_c, 0, kl, false};
  const Launches launches(elements.tensors, kElementsPerBlock);
  for (const LogitTensors& table : launches.tables) {
    adaptive_distillation_backward(table, options, scale, is_double(student), call.stream());
  }
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (stored[i].get() != gradients[i].get()) {
      torch::stable::copy_(gradients[i], stored[i]);
    }
  }
  return gradients;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, HKD_DEVICE, m) {
  m.impl("adaptive_distillation_loss", TORCH_BOX(&adaptive_distillation_loss_cuda));
  m.impl(
      "adaptive_distillation_loss_backward", TORCH_BOX(&adaptive_distillation_loss_backward_cuda));
}

} // namespace hkd
