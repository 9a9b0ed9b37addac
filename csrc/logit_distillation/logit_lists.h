// Lists of tensors as the logit losses are given them, the same on every device: checked, and
// readable element by element.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "dense_layout.h"
#include "dispatch.h"
#include "tensors.h"

namespace hkd {

using torch::stable::Tensor;

inline void check_list(
    const char* name, const std::vector<Tensor>& tensors, const std::vector<Tensor>& like) {
  STD_TORCH_CHECK(
      tensors.size() == like.size(), name, " has ", tensors.size(), " tensors, not ", like.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(
        same_device(tensors[i], like[0]), name, "[", i, "] must be on the device of the student.");
    STD_TORCH_CHECK(
        same_shape(tensors[i], like[i]), name, "[", i, "] must have the student's shape.");
  }
}

// Logits, probabilities and what is ignored. Tensors of one dense layout, which may be permuted
// (anchors before cells), are read as stored; others are copied to contiguous ones.
struct [[gnu::visibility("hidden")]] DenseLists {
  std::vector<Tensor> logits, probs, ignore; // the last empty where nothing is ignored
  std::vector<bool> as_stored;

  DenseLists(
      const std::vector<Tensor>& student_logits,
      const std::vector<Tensor>& teacher_probs,
      const std::vector<Tensor>& ignored) {
    STD_TORCH_CHECK(!student_logits.empty(), "student_logits is an empty list.");
    check_list("student_logits", student_logits, student_logits);
    check_list("teacher_probs", teacher_probs, student_logits);
    if (!ignored.empty()) {
      check_list("ignore", ignored, student_logits);
    }
    for (size_t i = 0; i < student_logits.size(); ++i) {
      const Tensor& x = student_logits[i];
      const Tensor& q = teacher_probs[i];
      const bool alike =
          is_dense(x) && lie_alike(x, q) && (ignored.empty() || lie_alike(x, ignored[i]));
      const auto readable = [alike](const Tensor& tensor) {
        return alike ? tensor : torch::stable::contiguous(tensor);
      };
      as_stored.push_back(alike);
      logits.push_back(readable(x));
      probs.push_back(readable(q));
      if (!ignored.empty()) {
        STD_TORCH_CHECK(ignored[i].scalar_type() == ScalarType::Bool, "ignore must be bool.");
        ignore.push_back(readable(ignored[i]));
      }
    }
  }

  const bool* mask(size_t i) const {
    return ignore.empty() ? nullptr : ignore[i].const_data_ptr<bool>();
  }
};

// Gradients of the logits in their own layouts, and the tensors that a kernel writes: the same
// ones where the lists are read as stored, contiguous ones otherwise.
struct [[gnu::visibility("hidden")]] DenseGradients {
  std::vector<Tensor> gradients, written;

  DenseGradients(const std::vector<Tensor>& student_logits, const DenseLists& lists) {
    for (size_t i = 0; i < student_logits.size(); ++i) {
      const Tensor& x = student_logits[i];
      gradients.push_back(torch::stable::empty_like(x)); // in the layout of x, where that is dense
      const bool direct = lists.as_stored[i] || gradients[i].is_contiguous();
      written.push_back(direct ? gradients[i] : torch::stable::new_empty(x, x.sizes()));
    }
  }

  std::vector<Tensor> finish() {
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (written[i].get() != gradients[i].get()) {
        torch::stable::copy_(gradients[i], written[i]);
      }
    }
    return std::move(gradients);
  }
};

} // namespace hkd
