// Stores that pass the caches by, for gradients that are larger than what a cache keeps until they
// are read: an ordinary store reads first what it overwrites.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "cpu_isa.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace hkd {

#if defined(__x86_64__) && defined(__GNUC__)
// Cache lines from `from`, or of zeros where it is null. A line that is one store is faster than
// one of four, which must be put together again.
__attribute__((target("avx512f"))) inline void stream_lines_avx512(
    char* to, const char* from, int64_t lines) {
  for (int64_t i = 0; i < 64 * lines; i += 64) {
    _mm512_stream_si512(
        reinterpret_cast<__m512i*>(to + i),
        from ? _mm512_loadu_si512(from + i) : _mm512_setzero_si512());
  }
}

inline void stream_lines(char* to, const char* from, int64_t lines) {
  if (best_isa() == Isa::kAvx512) {
    return stream_lines_avx512(to, from, lines);
  }
  for (int64_t i = 0; i < 64 * lines; i += 16) {
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(to + i),
        from ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)) : _mm_setzero_si128());
  }
}

// Makes streamed stores visible to other threads.
inline void stream_fence() {
  _mm_sfence();
}
#else
inline void stream_lines(char* to, const char* from, int64_t lines) {
  if (from) {
    std::memcpy(to, from, 64 * lines);
  } else {
    std::memset(to, 0, 64 * lines);
  }
}

inline void stream_fence() {
}
#endif

// `bytes` of `from`, or zeros where it is null.
inline void stream(char* to, const char* from, int64_t bytes) {
  const auto store = [&](int64_t first, int64_t last) {
    if (first < last && from) {
      std::memcpy(to + first, from + first, last - first);
    } else if (first < last) {
      std::memset(to + first, 0, last - first);
    }
  };
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) & 63);
  const int64_t lines = (bytes - head) / 64;
  store(0, head);
  stream_lines(to + head, from ? from + head : nullptr, lines);
  store(head + 64 * lines, bytes);
}

inline void zero_fill(const torch::stable::Tensor& tensor) {
  constexpr int64_t kChunk = 1 << 20;
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  const int64_t bytes = tensor.numel() * tensor.element_size();
  for_each_worker((bytes + kChunk - 1) / kChunk, [&](int64_t, const auto& next) {
    for (int64_t unit = next(); unit >= 0; unit = next()) {
      stream(data + unit * kChunk, nullptr, std::min(kChunk, bytes - unit * kChunk));
    }
    stream_fence();
  });
}

} // namespace hkd
