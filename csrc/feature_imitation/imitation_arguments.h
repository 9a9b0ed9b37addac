// The arguments of feature imitation, checked, as the CPU's and the GPU's operators take them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "hkd/distances.h"
#include "hkd/rasterize.h"

namespace hkd {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline void check(bool holds, const char* message) {
  STD_TORCH_CHECK(holds, "feature_imitation_loss: ", message);
}

// A list that is given, of `size` tensors on the device of `like`.
inline void check_list(const Tensors& list, size_t size, const Tensor& like, const char* message) {
  check(list.empty() || list.size() == size, message);
  for (const Tensor& tensor : list) {
    check(tensor.device() == like.device(), "every tensor must be on the student's device.");
  }
}

inline void check_maps(
    const Tensors& student,
    const Tensors& teacher,
    const Tensors& adapter_weights,
    const Tensors& adapter_biases,
    const Tensors& channel_weights,
    const std::vector<int64_t>& weight_of_level,
    const std::vector<int64_t>& bias_of_level) {
  const size_t levels = student.size();
  check(levels > 0 && teacher.size() == levels, "give as many levels of student and teacher.");
  check_list(student, levels, student[0], "");
  check_list(teacher, levels, student[0], "");
  check_list(adapter_weights, adapter_weights.size(), student[0], "");
  check_list(adapter_biases, adapter_biases.size(), student[0], "");
  check_list(channel_weights, levels, student[0], "give channel_weights for every level.");
  check(
      weight_of_level.size() == levels && bias_of_level.size() == levels,
      "give a place or -1 of the adapter for every level.");
  for (size_t l = 0; l < levels; ++l) {
    const Tensor &s = student[l], &t = teacher[l];
    check(s.dim() == 4 && t.dim() == 4, "maps must have shape (N, C, H, W).");
    check(
        s.size(0) == t.size(0) && s.size(0) == student[0].size(0) && s.size(2) == t.size(2) &&
            s.size(3) == t.size(3),
        "maps of a level must have the same images, height and width.");
    const int64_t weight = weight_of_level[l], bias = bias_of_level[l];
    check(
        weight < static_cast<int64_t>(adapter_weights.size()) &&
            bias < static_cast<int64_t>(adapter_biases.size()),
        "there is no such adapter.");
    check(
        weight < 0
            ? s.size(1) == t.size(1) && bias < 0
            : adapter_weights[weight].dim() == 2 && adapter_weights[weight].size(0) == t.size(1) &&
                  adapter_weights[weight].size(1) == s.size(1),
        "the adapter's weight must be (C_t, C_s); without one the channels must be equal.");
    check(
        bias < 0 || (adapter_biases[bias].dim() == 1 && adapter_biases[bias].size(0) == t.size(1)),
        "the adapter's bias must be (C_t,).");
    check(
        channel_weights.empty() ||
            (channel_weights[l].dim() == 2 && channel_weights[l].size(0) == t.size(0) &&
             channel_weights[l].size(1) == t.size(1)),
        "channel_weights must be (N, C_t).");
  }
}

inline void check_options(
    const Tensors& student,
    const Tensors& boxes,
    const Tensors& ignore_boxes,
    const Tensors& anchors,
    const Tensors& spatial_weights,
    const std::optional<Tensor>& level_weights,
    const std::vector<double>& strides,
    int64_t distance_code,
    int64_t rasterize_code) {
  const int64_t levels = student.size(), images = student[0].size(0);
  check_list(boxes, images, student[0], "give boxes for every image.");
  check_list(ignore_boxes, images, student[0], "give ignore_boxes for every image.");
  check_list(anchors, levels, student[0], "give anchors for every level.");
  check_list(spatial_weights, levels, student[0], "give spatial_weights for every level.");
  for (const Tensors* list : {&boxes, &ignore_boxes}) {
    check(list->empty() || static_cast<int64_t>(strides.size()) == levels, "strides are missing.");
    for (const Tensor& b : *list) {
      check(b.dim() == 2 && b.size(1) == 4, "boxes must have shape (R, 4).");
    }
  }
  check(rasterize_code >= 0 && rasterize_code <= 3, "there is no such rule to rasterize.");
  const bool near_anchors = static_cast<Rasterize>(rasterize_code) == Rasterize::kFgfi;
  check(!near_anchors || boxes.empty() || !anchors.empty(), "anchors are missing.");
  for (int64_t l = 0; l < levels; ++l) {
    check(
        anchors.empty() || (anchors[l].dim() == 2 && anchors[l].size(1) == 2),
        "anchors must have shape (A, 2).");
    check(
        spatial_weights.empty() ||
            (spatial_weights[l].dim() == 3 && spatial_weights[l].size(0) == images &&
             spatial_weights[l].size(1) == student[l].size(2) &&
             spatial_weights[l].size(2) == student[l].size(3)),
        "spatial_weights must have shape (N, H, W).");
  }
  check(
      !level_weights ||
          (level_weights->device() == student[0].device() && level_weights->numel() == levels),
      "level_weights must have shape (L,).");
  check(distance_code >= 0 && distance_code <= 4, "there is no such distance.");
}

inline void check_backward(
    const Tensor& grad,
    const Tensors& student,
    const Tensors& teacher,
    const Tensors& saved,
    int64_t distance_code) {
  const size_t levels = student.size();
  const ScalarType type = accumulate_type(student[0].scalar_type());
  const Distance distance = static_cast<Distance>(distance_code);
  check(distance_code >= 0 && distance_code <= 4, "there is no such distance.");
  check(
      grad.device() == student[0].device() && grad.numel() == 1 && grad.scalar_type() == type,
      "grad must be one number on the student's device in the dtype of the loss.");
  check(
      saved.size() == levels + 1 && saved[levels].device() == student[0].device() &&
          saved[levels].is_contiguous() && saved[levels].scalar_type() == ScalarType::Double &&
          saved[levels].numel() == static_cast<int64_t>(levels),
      "saved is not what forward returned.");
  for (size_t l = 0; l < levels; ++l) {
    const int64_t cells = student[l].size(0) * student[l].size(2) * student[l].size(3);
    const int64_t numbers = distance == Distance::kCosine ? 2 * cells
                            : distance == Distance::kPkd  ? 4 * teacher[l].size(1)
                            : saved[l].numel() == 0       ? 0
                                                          : cells;
    check(
        saved[l].device() == student[0].device() && saved[l].is_contiguous() &&
            saved[l].scalar_type() == type && saved[l].numel() == numbers,
        "saved is not what forward returned.");
  }
}

inline std::vector<float> log2_of(const std::vector<double>& strides) {
  std::vector<float> logarithms;
  for (const double stride : strides) {
    logarithms.push_back(static_cast<float>(std::log2(stride)));
  }
  return logarithms;
}

} // namespace hkd
