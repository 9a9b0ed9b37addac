// Numbers in memory whose type is known at run time. Needs no torch header.
#pragma once

#include <cstdint>

namespace hkd {

enum class Storage : int8_t { kDouble, kFloat, kHalf, kBFloat16 };

// The elements of a contiguous tensor.
struct Numbers {
  void* data;
  Storage storage;
};

} // namespace hkd
