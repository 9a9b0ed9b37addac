// Lists of tensors as the CUDA kernels of this folder take them: tables of at most kMaxTensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "device_call.h"
#include "logit_distillation/logit_kernels.h"
#include "logit_distillation/logit_lists.h"

namespace hkd {

inline bool is_double(const Tensor& student) {
  return student.scalar_type() == ScalarType::Double;
}

inline bool starts_at_16_bytes(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Room for a pair of sums of every block, in the dtype of the loss.
inline Tensor sum_pairs(const Tensor& student, int64_t blocks, LossSums* sums) {
  const Tensor pairs =
      torch::stable::new_empty(student, {blocks, 2}, accumulate_type(student.scalar_type()));
  sums->pairs = pairs.mutable_data_ptr();
  sums->count = blocks;
  return pairs;
}

// Tables of tensors, with the blocks of each launch.
struct Launches {
  std::vector<LogitTensors> tables;
  int64_t blocks = 0;

  // Empty tensors get no block. One tensor that two blocks would share gets one that does twice the
  // work and finishes the loss, since another launch takes longer than that (ours, not measured).
  Launches(const std::vector<LogitTensor>& tensors, int64_t items_per_block) {
    if (tensors.size() == 1 && tensors[0].items <= 2 * items_per_block) {
      items_per_block *= 2;
    }
    for (LogitTensor tensor : tensors) {
      if (tensor.items == 0) {
        continue;
      }
      if (tables.empty() || tables.back().count == kMaxTensors) {
        tables.emplace_back();
        tables.back().items_per_block = items_per_block;
        tables.back().blocks_before = blocks;
      }
      LogitTensors& table = tables.back();
      const int64_t count = (tensor.items + items_per_block - 1) / items_per_block;
      tensor.first_block = table.blocks;
      table.tensors[table.count++] = tensor;
      table.blocks += static_cast<int32_t>(count);
      blocks += count;
    }
  }

  // Calls launch(table) for each, which leaves its sums where `sums` says, and finishes the loss.
  template <typename Launch>
  void finish(
      const Tensor& student, LossSums& sums, cudaStream_t stream, const Launch& launch) const {
    const Tensor pairs = sum_pairs(student, blocks, &sums);
    for (const LogitTensors& table : tables) {
      launch(table);
    }
    if (!sums.by_one_block()) {
      finish_loss(sums, is_double(student), stream);
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
