// Work for the threads of PyTorch's pool, handed out as they become free.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace hkd {

// Calls body(worker, next) once a worker; next() returns the next unit in [0, units), or -1 when
// none is left. Which worker gets a unit is left to chance, so a unit must not depend on it.
template <typename Body>
void for_each_worker(int64_t units, const Body& body) {
  const int64_t workers = std::min<int64_t>(units, torch::stable::get_num_threads());
  std::atomic<int64_t> counter{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    body(worker, [&] {
      const int64_t unit = counter.fetch_add(1, std::memory_order_relaxed);
      return unit < units ? unit : -1;
    });
  });
}

// Until other workers have counted up to `value`. They must not wait for this one in turn: units
// are handed out in order, so a unit may wait for units before it.
inline void wait_for(const std::atomic<int64_t>& counter, int64_t value) {
  while (counter.load(std::memory_order_acquire) < value) {
    std::this_thread::yield();
  }
}

} // namespace hkd
