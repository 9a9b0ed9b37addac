// What the operators of RoI distillation are given, the same on every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "feature_maps.h"
#include "hkd/distances.h"
#include "roi_align/options.h"

namespace hkd {

using torch::stable::Tensor;

struct [[gnu::visibility("hidden")]] RoiDistillation {
  std::vector<Tensor> student, teacher, boxes;
  std::vector<Tensor> weights, biases;
  std::vector<int64_t> weight_of_level, bias_of_level; // -1 where there is none
  RoiOptions options;
  Distance distance;

  // Adapters as they were given; `weights` and `biases` become contiguous in the type that is
  // computed in, as maps become readable as stored.
  std::vector<Tensor> given_weights, given_biases;

  RoiDistillation(
      std::vector<Tensor> student,
      std::vector<Tensor> teacher,
      std::vector<Tensor> boxes,
      std::vector<Tensor> weights,
      std::vector<Tensor> biases,
      std::vector<int64_t> weight_of_level,
      std::vector<int64_t> bias_of_level,
      RoiOptions options,
      int64_t distance)
      : student(std::move(student)),
        teacher(std::move(teacher)),
        boxes(std::move(boxes)),
        weights(std::move(weights)),
        biases(std::move(biases)),
        weight_of_level(std::move(weight_of_level)),
        bias_of_level(std::move(bias_of_level)),
        options(std::move(options)),
        distance(static_cast<Distance>(distance)),
        given_weights(this->weights),
        given_biases(this->biases) {
    STD_TORCH_CHECK(
        distance >= 0 && distance <= static_cast<int64_t>(Distance::kCosine), "Unknown distance.");
    check();
    this->student = as_stored(this->student);
    this->teacher = as_stored(this->teacher);
    for (std::vector<Tensor>* list : {&this->weights, &this->biases}) {
      for (Tensor& tensor : *list) {
        tensor = torch::stable::contiguous(torch::stable::to(tensor, accumulate_type(type())));
      }
    }
  }

  ScalarType type() const {
    return student[0].scalar_type();
  }
  int levels() const {
    return static_cast<int>(student.size());
  }
  int64_t student_channels() const {
    return student[0].size(1);
  }
  int64_t teacher_channels() const {
    return teacher[0].size(1);
  }
  bool by_difference(int level) const {
    return weight_of_level[level] < 0 && distance != Distance::kCosine;
  }
  bool by_rows() const {
    for (int level = 0; level < levels(); ++level) {
      if (!by_difference(level)) {
        return true;
      }
    }
    return false;
  }
  // What the sum of all distances is divided by; at least 1.
  double normalizer() const {
    int64_t rois = 0;
    for (const auto& list : boxes) {
      rois += list.size(0);
    }
    const int64_t channels = distance == Distance::kCosine ? 1 : teacher_channels();
    return std::max<double>(static_cast<double>(rois * options.bins() * channels), 1);
  }
  void check_gradient(const Tensor& grad) const {
    STD_TORCH_CHECK(
        same_device(grad, student[0]) && grad.numel() == 1 &&
            grad.scalar_type() == accumulate_type(type()),
        "grad must be one number on the device of the student, in the dtype of the loss.");
  }

 private:
  void check() const {
    check_pyramid(student, boxes, options);
    check_pyramid(teacher, boxes, options);
    STD_TORCH_CHECK(
        weight_of_level.size() == student.size() && bias_of_level.size() == student.size(),
        "Give the index of a weight and of a bias, or -1, a level.");
    for (int level = 0; level < levels(); ++level) {
      const int64_t w = weight_of_level[level], b = bias_of_level[level];
      STD_TORCH_CHECK(
          student[level].size(2) == teacher[level].size(2) &&
              student[level].size(3) == teacher[level].size(3) &&
              same_device(student[level], teacher[level]),
          "student and teacher must have maps of one size on one device.");
      STD_TORCH_CHECK(
          w < 0 ? student_channels() == teacher_channels() && b < 0
                : w < static_cast<int64_t>(weights.size()) && weights[w].dim() == 2 &&
                      weights[w].size(0) == teacher_channels() &&
                      weights[w].size(1) == student_channels(),
          "An adapter's weight must be (C_t, C_s); only equal widths can do without.");
      STD_TORCH_CHECK(
          b < static_cast<int64_t>(biases.size()) &&
              (b < 0 || biases[b].numel() == teacher_channels()),
          "An adapter's bias must be (C_t,).");
    }
    for (const std::vector<Tensor>* list : {&weights, &biases}) {
      for (const Tensor& tensor : *list) {
        STD_TORCH_CHECK(same_device(tensor, student[0]), "Every tensor must be on one device.");
      }
    }
  }
};

// Gradients of the student's maps, of the weights and of the biases.
using RoiDistillationGradients =
    std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

// The operators as the schema has them, from what computes a checked call.
template <Tensor (*compute)(const RoiDistillation&)>
Tensor roi_distillation_loss(
    std::vector<Tensor> student,
    std::vector<Tensor> teacher,
    std::vector<Tensor> boxes,
    std::vector<Tensor> weights,
    std::vector<Tensor> biases,
    std::vector<int64_t> weight_of_level,
    std::vector<int64_t> bias_of_level,
    std::vector<double> strides,
    int64_t rows,
    int64_t columns,
    int64_t sampling_ratio,
    int64_t distance) {
  return compute(
      {student,
       teacher,
       boxes,
       weights,
       biases,
       weight_of_level,
       bias_of_level,
       {strides, rows, columns, sampling_ratio},
       distance});
}

template <RoiDistillationGradients (*compute)(const Tensor&, const RoiDistillation&, bool)>
RoiDistillationGradients roi_distillation_loss_backward(
    const Tensor& grad,
    std::vector<Tensor> student,
    std::vector<Tensor> teacher,
    std::vector<Tensor> boxes,
    std::vector<Tensor> weights,
    std::vector<Tensor> biases,
    std::vector<int64_t> weight_of_level,
    std::vector<int64_t> bias_of_level,
    std::vector<double> strides,
    int64_t rows,
    int64_t columns,
    int64_t sampling_ratio,
    int64_t distance,
    bool deterministic) {
  const RoiDistillation call(
      student,
      teacher,
      boxes,
      weights,
      biases,
      weight_of_level,
      bias_of_level,
      {strides, rows, columns, sampling_ratio},
      distance);
  call.check_gradient(grad);
  return compute(grad, call, deterministic);
}

} // namespace hkd
