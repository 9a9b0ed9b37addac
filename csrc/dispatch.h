// From the scalar type of a tensor to a C++ type, for the types that every operator takes.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace hkd {

using torch::headeronly::ScalarType;

// The type that values of T are computed in.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body(T{}) with the C++ type T of `type`; `name` is the argument that an error names.
template <typename Body>
void dispatch_floating(ScalarType type, const char* name, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(
          false,
          name,
          " is ",
          torch::headeronly::toString(type),
          "; give float16, bfloat16, float32 or float64.");
  }
}

} // namespace hkd
