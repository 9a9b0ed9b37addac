// One build, three instruction sets: a kernel body is compiled for each, and the machine chooses.
//
//   with_best_isa([&](auto lanes) {
//     constexpr int kLanes = decltype(lanes)::value;  // float lanes of a vector register: 4, 8, 16
//     ...plain loops, which the compiler vectorises...
//   });
//
// `flatten` draws everything that the body calls into the function whose target is wider, so the
// body and its helpers need no annotation; what cannot be inlined runs as baseline code. A
// parallel_for goes outside, since its callback is reached through a pointer.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace hkd {

// kIsaNames has the names of those that are compiled.
enum class Isa { kBaseline, kAvx2, kAvx512 };

#if defined(__x86_64__) && defined(__GNUC__)
inline constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

// Clang would drop the whole target for the width, which it does not know.
#if defined(__clang__)
#define HKD_WIDTH_512
#else
#define HKD_WIDTH_512 ",prefer-vector-width=512"
#endif
#define HKD_AVX2 __attribute__((flatten, target("avx2,fma,f16c")))
#define HKD_AVX512 \
  __attribute__((flatten, target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl" HKD_WIDTH_512)))

// The widest set that the machine runs; HKD_CPU_ISA=baseline|avx2|avx512 lowers it.
inline Isa best_isa() {
  static const Isa isa = [] {
    const char* limit = std::getenv("HKD_CPU_ISA");
    const auto allowed = [limit](const char* name) {
      return limit == nullptr || std::strcmp(limit, name) == 0;
    };
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && allowed("avx512")) {
      return Isa::kAvx512;
    }
    if (avx2 && (allowed("avx2") || allowed("avx512"))) {
      return Isa::kAvx2;
    }
    return Isa::kBaseline;
  }();
  return isa;
}
#else
inline constexpr const char* kIsaNames[] = {"baseline"};

#define HKD_AVX2
#define HKD_AVX512

inline Isa best_isa() {
  return Isa::kBaseline;
}
#endif

template <typename Body>
HKD_AVX512 void run_avx512(const Body& body) {
  body(std::integral_constant<int, 16>{});
}

template <typename Body>
HKD_AVX2 void run_avx2(const Body& body) {
  body(std::integral_constant<int, 8>{});
}

// Runs body(lanes) compiled for the best instruction set of this machine.
template <typename Body>
void with_best_isa(const Body& body) {
  switch (best_isa()) {
    case Isa::kAvx512:
      return run_avx512(body);
    case Isa::kAvx2:
      return run_avx2(body);
    default:
      return body(std::integral_constant<int, 4>{});
  }
}

} // namespace hkd
