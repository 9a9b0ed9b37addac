// A list of tensors of any floating types as kernels of this folder go through it: in blocks, in
// parallel, every value as Acc (float, or double where the first tensor is double).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_isa.h"
#include "dispatch.h"
#include "hkd/vector_math.h"
#include "logit_distillation/logit_lists.h"

namespace hkd {

// Calls body(Acc{}) with the type that values of `type` are computed in.
template <typename Body>
void dispatch_accumulate(ScalarType type, const Body& body) {
  type == ScalarType::Double ? body(double{}) : body(float{});
}

// The elements of a contiguous tensor of one of the four types.
struct Values {
  void* data;
  ScalarType type;

  static Values to_read(const char* name, const Tensor& tensor) {
    dispatch_floating(tensor.scalar_type(), name, [](auto) {}); // refuses other types
    return {const_cast<void*>(tensor.const_data_ptr()), tensor.scalar_type()};
  }
  static Values to_write(Tensor& tensor) {
    return {tensor.mutable_data_ptr(), tensor.scalar_type()};
  }

  template <typename Body>
  void as_stored(const Body& body) const {
    switch (type) {
      case ScalarType::Double:
        return body(static_cast<double*>(data));
      case ScalarType::Float:
        return body(static_cast<float*>(data));
      case ScalarType::Half:
        return body(static_cast<torch::headeronly::Half*>(data));
      default:
        return body(static_cast<torch::headeronly::BFloat16*>(data));
    }
  }

  template <typename Acc>
  void copy_to(Acc* target, int64_t begin, int64_t count) const {
    as_stored([&](auto* source) {
      for (int64_t i = 0; i < count; ++i) {
        target[i] = static_cast<Acc>(source[begin + i]);
      }
    });
  }

  // The elements [begin, begin + count): in place where they are stored as Acc, else in `scratch`.
  template <typename Acc>
  const Acc* read(int64_t begin, int64_t count, Acc* scratch) const {
    if (type == (sizeof(Acc) == sizeof(double) ? ScalarType::Double : ScalarType::Float)) {
      return static_cast<const Acc*>(data) + begin;
    }
    copy_to(scratch, begin, count);
    return scratch;
  }

  template <typename Acc>
  void write(const Acc* values, int64_t begin, int64_t count) const {
    as_stored([&](auto* target) {
      using T = std::remove_pointer_t<decltype(target)>;
      for (int64_t i = 0; i < count; ++i) {
        target[begin + i] = static_cast<T>(values[i]);
      }
    });
  }
};

inline std::vector<Values> to_read(const char* name, const std::vector<Tensor>& tensors) {
  std::vector<Values> values;
  for (const Tensor& tensor : tensors) {
    values.push_back(Values::to_read(name, tensor));
  }
  return values;
}

inline std::vector<Values> to_write(std::vector<Tensor>& tensors) {
  std::vector<Values> values;
  for (Tensor& tensor : tensors) {
    values.push_back(Values::to_write(tensor));
  }
  return values;
}

// Items (elements, or rows) begin to end of one tensor of the list.
struct Block {
  size_t tensor;
  int64_t begin, end;
};

// Cuts tensors of these numbers of items into blocks, which depend on nothing else.
inline std::vector<Block> cut_into_blocks(const std::vector<int64_t>& items, int64_t per_block) {
  std::vector<Block> blocks;
  for (size_t tensor = 0; tensor < items.size(); ++tensor) {
    for (int64_t begin = 0; begin < items[tensor]; begin += per_block) {
      blocks.push_back({tensor, begin, std::min(items[tensor], begin + per_block)});
    }
  }
  return blocks;
}

// Calls body(index, block, scratch, lanes) for every block: in parallel, by the best instruction
// set, with `scratch_size` numbers to work in and the lanes of its vectors as a constant. Sums that
// blocks leave by their index and that are added in order do not depend on the number of threads.
template <typename Acc, typename Body>
void for_each_block(const std::vector<Block>& blocks, int64_t scratch_size, const Body& body) {
  torch::stable::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(scratch_size);
    Acc* const numbers = scratch.data();
    with_best_isa([&](auto lanes) {
      for (int64_t index = begin; index < end; ++index) {
        body(index, blocks[index], numbers, lanes);
      }
    });
  });
}

// result[i] = f(a[i], b[i]), V at a time.
template <typename V, typename Acc, typename F>
void map(const Acc* a, const Acc* b, Acc* result, int64_t count, const F& f) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(Acc);
  const auto apply = [&f](const Acc* a, const Acc* b, Acc* result) {
    V x, y;
    std::memcpy(&x, a, sizeof(V));
    std::memcpy(&y, b, sizeof(V));
    const V z = f(x, y);
    std::memcpy(result, &z, sizeof(V));
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    apply(a + i, b + i, result + i);
  }
  if (i < count) {
    Acc rest_a[kLanes] = {}, rest_b[kLanes] = {}, rest[kLanes];
    std::copy(a + i, a + count, rest_a);
    std::copy(b + i, b + count, rest_b);
    apply(rest_a, rest_b, rest);
    std::copy(rest, rest + (count - i), result + i);
  }
}

// The sum of the values in double, in lanes that the compiler keeps in vector registers.
template <typename Acc>
double sum_of(const Acc* values, int64_t count) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += values[i + lane];
    }
  }
  double sum = 0;
  for (; i < count; ++i) {
    sum += values[i];
  }
  for (const double lane : lanes) {
    sum += lane;
  }
  return sum;
}

inline double sum_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) {
    sum += value;
  }
  return sum;
}

// max(sum, 1); NaN stays.
inline double at_least_one(double sum) {
  return sum < 1 ? 1 : sum;
}

inline Tensor scalar_like(const Tensor& tensor, double value) {
  Tensor scalar = torch::stable::new_empty(tensor, {}, accumulate_type(tensor.scalar_type()));
  dispatch_floating(scalar.scalar_type(), "the result", [&](auto type) {
    using T = decltype(type);
    *scalar.mutable_data_ptr<T>() = static_cast<T>(value);
  });
  return scalar;
}

// The number that a tensor without axes holds.
inline double number_of(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == 1, name, " must be one number on the CPU.");
  switch (tensor.scalar_type()) {
    case ScalarType::Long:
      return static_cast<double>(*tensor.const_data_ptr<int64_t>());
    case ScalarType::Int:
      return *tensor.const_data_ptr<int32_t>();
    default:
      double number = 0;
      dispatch_floating(tensor.scalar_type(), name, [&](auto type) {
        number = *tensor.const_data_ptr<decltype(type)>();
      });
      return number;
  }
}

} // namespace hkd
