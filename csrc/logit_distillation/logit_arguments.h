// Lists of tensors as the CUDA kernels of this folder take them: tables of at most kMaxTensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "device_call.h"
#include "logit_distillation/logit_kernels.h"
#include "tensors.h"

namespace hkd {

using torch::stable::Tensor;

inline bool is_double(const Tensor& student) {
  return student.scalar_type() == ScalarType::Double;
}

inline void check_like(
    const char* name, const std::vector<Tensor>& tensors, const std::vector<Tensor>& like) {
  STD_TORCH_CHECK(
      tensors.size() == like.size(), name, " has ", tensors.size(), " tensors, not ", like.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(
        same_device(tensors[i], like[0]), name, "[", i, "] must be on the device of the student.");
    bool same = tensors[i].dim() == like[i].dim();
    for (int64_t axis = 0; same && axis < like[i].dim(); ++axis) {
      same = tensors[i].size(axis) == like[i].size(axis);
    }
    STD_TORCH_CHECK(same, name, "[", i, "] must have the student's shape.");
  }
}

inline bool starts_at_16_bytes(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Tables of tensors, with the blocks of each launch and where its pairs of sums go.
struct Launches {
  std::vector<LogitTensors> tables;
  int64_t blocks = 0;

  // Empty tensors get no block.
  Launches(const std::vector<LogitTensor>& tensors, int64_t items_per_block) {
    for (LogitTensor tensor : tensors) {
      if (tensor.items == 0) {
        continue;
      }
      if (tables.empty() || tables.back().count == kMaxTensors) {
        tables.emplace_back();
      }
      LogitTensors& table = tables.back();
      const int64_t count = (tensor.items + items_per_block - 1) / items_per_block;
      tensor.first_block = table.blocks;
      table.tensors[table.count++] = tensor;
      table.blocks += static_cast<int32_t>(count);
      blocks += count;
    }
  }

  // Room for a pair of sums of every block, in the dtype of the loss.
  Tensor pairs(const Tensor& student) const {
    return torch::stable::new_empty(student, {blocks, 2}, accumulate_type(student.scalar_type()));
  }

  // Calls launch(table, pairs of its first block) for each.
  template <typename Launch>
  void with_pairs(const Tensor& pairs, const Launch& launch) const {
    char* place = static_cast<char*>(pairs.mutable_data_ptr());
    for (const LogitTensors& table : tables) {
      launch(table, place);
      place += 2 * table.blocks * pairs.element_size();
    }
  }
};

inline Tensor empty_loss(const Tensor& student) {
  return torch::stable::new_empty(student, {}, accumulate_type(student.scalar_type()));
}

inline GradientScale gradient_scale(
    const Tensor& grad, const Tensor& student, double factor, const DeviceNumber& denominator) {
  STD_TORCH_CHECK(
      same_device(grad, student) && grad.numel() == 1 &&
          grad.scalar_type() == accumulate_type(student.scalar_type()),
      "grad must be one number on the device of the student, in the dtype of the loss.");
  return {factor, grad.const_data_ptr(), denominator};
}

inline DeviceNumber number(double value) {
  return {{nullptr, Storage::kFloat}, nullptr, value};
}

// The one number of a tensor on the device.
inline DeviceNumber number(const char* name, const Tensor& tensor, const Tensor& student) {
  STD_TORCH_CHECK(
      tensor.numel() == 1 && same_device(tensor, student),
      name,
      " must be one number on the device of the student.");
  if (tensor.scalar_type() == ScalarType::Long) {
    return {{nullptr, Storage::kFloat}, tensor.const_data_ptr<int64_t>(), 0};
  }
  return {numbers_to_read(name, tensor), nullptr, 0};
}

} // namespace hkd
