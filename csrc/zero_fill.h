// Zeros for a gradient that is larger than the caches.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "parallel.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace hkd {

// Stores that pass the caches by do not read first what they overwrite.
inline void zero_fill(char* data, int64_t bytes) {
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(data) & 63);
  std::memset(data, 0, head);
  const __m128i zero = _mm_setzero_si128();
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    __m128i* line = reinterpret_cast<__m128i*>(data + i);
    _mm_stream_si128(line, zero);
    _mm_stream_si128(line + 1, zero);
    _mm_stream_si128(line + 2, zero);
    _mm_stream_si128(line + 3, zero);
  }
  std::memset(data + i, 0, bytes - i);
  _mm_sfence();
#else
  std::memset(data, 0, bytes);
#endif
}

inline void zero_fill(const torch::stable::Tensor& tensor) {
  constexpr int64_t kChunk = 1 << 20;
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  const int64_t bytes = tensor.numel() * tensor.element_size();
  for_each_worker((bytes + kChunk - 1) / kChunk, [&](int64_t, const auto& next) {
    for (int64_t unit = next(); unit >= 0; unit = next()) {
      zero_fill(data + unit * kChunk, std::min(kChunk, bytes - unit * kChunk));
    }
  });
}

} // namespace hkd
