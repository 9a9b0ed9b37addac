// Products of matrices on the CPU, by the library that PyTorch multiplies with.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "parallel.h"

#if defined(__GNUC__)
#define HKD_NOINLINE __attribute__((noinline))
// MKL's, null where PyTorch multiplies with another library: the number of threads for products of
// the calling thread. Returns the one before, 0 for that of all threads.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));
#define HKD_SET_MKL_THREADS MKL_Set_Num_Threads_Local
#else
#define HKD_NOINLINE
#define HKD_SET_MKL_THREADS static_cast<int (*)(int)>(nullptr)
#endif

namespace hkd {

// MKL on one thread while this lives. Within a parallel region it starts no others, but still cuts
// a long sum into a part for each thread that PyTorch gave it, and bits would depend on these.
class OneMklThread {
 public:
  OneMklThread() : before_(HKD_SET_MKL_THREADS ? HKD_SET_MKL_THREADS(1) : 0) {
  }
  ~OneMklThread() {
    if (HKD_SET_MKL_THREADS) {
      HKD_SET_MKL_THREADS(before_);
    }
  }
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;

 private:
  int before_;
};

template <typename T>
constexpr torch::headeronly::ScalarType scalar_type_of() {
  return std::is_same_v<T, double> ? torch::headeronly::ScalarType::Double
                                   : torch::headeronly::ScalarType::Float;
}

// out (m, n) = a (m, k) b (k, n); a side is stored transposed where its flag is set, and then lines
// of `a` are `a_pitch` apart (0: m). To be called within a parallel region, where it runs on one
// thread and its bits depend on the shapes alone.
template <typename Acc>
HKD_NOINLINE void multiply(
    Acc* out,
    const Acc* a,
    bool a_transposed,
    const Acc* b,
    bool b_transposed,
    int64_t m,
    int64_t n,
    int64_t k,
    int64_t a_pitch = 0) {
  const auto matrix =
      [](const Acc* data, int64_t rows, int64_t columns, bool transposed, int64_t pitch) {
        return torch::stable::from_blob(
            const_cast<Acc*>(data),
            {rows, columns},
            {transposed ? 1 : columns, transposed ? pitch : 1},
            torch::stable::Device(torch::headeronly::DeviceType::CPU),
            scalar_type_of<Acc>());
      };
  std::array<StableIValue, 3> stack = {
      torch::stable::detail::from(matrix(a, m, k, a_transposed, a_pitch ? a_pitch : m)),
      torch::stable::detail::from(matrix(b, k, n, b_transposed, k)),
      torch::stable::detail::from(matrix(out, m, n, false, 0))};
  const OneMklThread one_thread;
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]); // takes over what is returned
}

// The same in strips of rows, which the threads share.
template <typename Acc>
void multiply_in_strips(
    Acc* out,
    const Acc* a,
    bool a_transposed,
    const Acc* b,
    bool b_transposed,
    int64_t m,
    int64_t n,
    int64_t k) {
  constexpr int64_t kStripRows = 256; // a GEMM of this height is efficient
  // A single unit would run outside of a parallel region, so there are two at least.
  const int64_t strips = std::max<int64_t>(2, (m + kStripRows - 1) / kStripRows);
  const int64_t height = (m + strips - 1) / strips;
  for_each_worker(strips, [&](int64_t, const auto& next) {
    for (int64_t strip = next(); strip >= 0; strip = next()) {
      const int64_t first = strip * height, rows = std::min(height, m - first);
      if (rows > 0) {
        const Acc* part = a + (a_transposed ? first : first * k);
        multiply(out + first * n, part, a_transposed, b, b_transposed, rows, n, k, m);
      }
    }
  });
}

} // namespace hkd
