// The part of CUDA that the kernels use, on a CPU, for tests: g++ compiles the kernels' own text.
//
// Blocks run one after another, a block's threads as fibers that change over only where they
// synchronise. Threads and blocks take turns in the order of a seed (0 ascending, 1 descending,
// other seeds shuffled), so what depends on an order that CUDA does not promise differs between
// seeds. Told by an exception: a barrier or warp operation that some thread does not reach, a
// shuffle from a lane that takes no part, and a launch that CUDA would refuse. ASan and UBSan see
// plain host memory, so they tell accesses out of bounds. Shared memory starts as NaN (static
// arrays only without ASan, which guards their bounds instead).
//
// Not there: inline PTX, textures, tensor cores, clusters, races between blocks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace hkd::emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMaxSharedBytes = 48 * 1024; // what a launch gets without asking for more

// Where a thread synchronises. Threads meet if they are at the same one.
struct Site {
  const char* operation;
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    return line == other.line && !std::strcmp(operation, other.operation) &&
           !std::strcmp(file, other.file);
  }
  std::string text() const {
    return std::string(operation) + " of " + file + ":" + std::to_string(line);
  }
};

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Value {
  alignas(16) unsigned char bytes[16];
};

struct Thread {
  int rank;
  uint3 index;
  State state;
  Site site;
  // A warp operation: its lanes, what this lane gives, whose value it takes, and what it got.
  unsigned mask;
  Value given, taken;
  int source;
  bool vote;
  unsigned ballot;

  std::unique_ptr<char[]> stack;
  jmp_buf at;
};

struct Machine {
  std::mutex mutex;
  uint64_t seed = 0;
  std::mt19937_64 random;
  std::string dropped_file;
  int dropped_line = 0;
  std::set<std::string> ran; // names of kernels
  int launches = 0;

  dim3 grid, block;
  uint3 block_index;
  std::vector<unsigned char> shared;
  const std::function<void()>* kernel;
  const char* name;
  std::vector<std::unique_ptr<Thread>> threads;
  Thread* running;
  std::string failure;
  jmp_buf scheduler;
};

inline Machine machine;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error(std::string("Kernel ") + machine.name + ": " + what);
}

// ------------------------------------------------------------------------------------- fibers
#if defined(__SANITIZE_ADDRESS__)
// ASan has to know which stack is in use.
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
inline void leave_for(const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(nullptr, stack, bytes);
}
inline void arrive(const void** from, size_t* bytes) {
  __sanitizer_finish_switch_fiber(nullptr, from, bytes);
}
#define HKD_LEAVE_FOR_SCHEDULER() leave_for(scheduler_stack, scheduler_stack_bytes)
#define HKD_LEAVE_FOR_THREAD(thread) leave_for((thread).stack.get(), kStackBytes)
#define HKD_ARRIVE_IN_THREAD() arrive(&scheduler_stack, &scheduler_stack_bytes)
#define HKD_ARRIVE_IN_SCHEDULER() arrive(nullptr, nullptr)
#else
#define HKD_LEAVE_FOR_SCHEDULER()
#define HKD_LEAVE_FOR_THREAD(thread)
#define HKD_ARRIVE_IN_THREAD()
#define HKD_ARRIVE_IN_SCHEDULER()
#endif

// Suspends the running thread.
inline void yield() {
  Thread& thread = *machine.running;
  if (!_setjmp(thread.at)) {
    HKD_LEAVE_FOR_SCHEDULER();
    _longjmp(machine.scheduler, 1);
  }
  HKD_ARRIVE_IN_THREAD();
}

inline void fiber() {
  HKD_ARRIVE_IN_THREAD();
  for (;;) {
    (*machine.kernel)();
    machine.running->state = State::kDone;
    yield();
  }
}

// Runs a thread until it synchronises or returns.
inline void resume(Thread& thread) {
  const bool begun = thread.stack != nullptr;
  if (!begun) {
    thread.stack.reset(new char[kStackBytes]);
  }
  machine.running = &thread;
  if (!_setjmp(machine.scheduler)) {
    HKD_LEAVE_FOR_THREAD(thread);
    if (begun) {
      _longjmp(thread.at, 1);
    }
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber, 0);
    setcontext(&context);
  }
  HKD_ARRIVE_IN_SCHEDULER();
  if (!machine.failure.empty()) {
    fail(machine.failure);
  }
}

// ---------------------------------------------------------------------------- synchronisation
// What is wrong in the calling thread; the scheduler throws it.
[[noreturn]] inline void fail_in_thread(const Site& site, const std::string& what) {
  machine.failure =
      "thread " + std::to_string(machine.running->rank) + ", " + site.text() + ": " + what;
  yield();
  __builtin_unreachable();
}

// For mutation tests: synchronisation at this line of this file does nothing.
inline bool is_dropped(const Site& site) {
  const std::string file = site.file;
  const std::string& tail = machine.dropped_file;
  return site.line == machine.dropped_line && file.size() >= tail.size() &&
         file.compare(file.size() - tail.size(), tail.size(), tail) == 0;
}

inline void sync_threads(const Site& site) {
  if (is_dropped(site)) {
    return;
  }
  Thread& thread = *machine.running;
  thread.state = State::kAtBarrier;
  thread.site = site;
  yield();
}

// Meets the other lanes of the mask; then `taken` is what lane `source` gave.
inline Thread& meet(const Site& site, unsigned mask, int source, const Value& value, bool vote) {
  Thread& thread = *machine.running;
  const int lane = thread.rank % kWarp;
  const int first = thread.rank - lane;
  if (!(mask >> lane & 1)) {
    fail_in_thread(site, "the mask leaves out the thread that calls it.");
  }
  if (!(mask >> source & 1)) {
    fail_in_thread(site, "takes from lane " + std::to_string(source) + ", outside the mask.");
  }
  thread.state = State::kInWarp;
  thread.site = site;
  thread.mask = mask;
  thread.source = source;
  thread.given = value;
  thread.vote = vote;
  const int size = static_cast<int>(machine.threads.size());
  unsigned ballot = 0;
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) {
      continue;
    }
    if (first + l >= size) {
      fail_in_thread(site, "the mask names lanes that the block does not have.");
    }
    const Thread& other = *machine.threads[first + l];
    if (other.state != State::kInWarp || other.mask != mask || !(other.site == site)) {
      yield();
      return thread;
    }
    ballot |= unsigned(other.vote) << l;
  }
  for (int l = 0; l < kWarp; ++l) {
    if (mask >> l & 1) {
      Thread& other = *machine.threads[first + l];
      other.taken = machine.threads[first + other.source]->given;
      other.ballot = ballot;
      other.state = State::kReady;
    }
  }
  return thread;
}

template <typename T>
T shuffle(const Site& site, unsigned mask, T value, int source, int width) {
  static_assert(sizeof(T) <= sizeof(Value));
  if (width < 1 || width > kWarp || (width & (width - 1))) {
    fail_in_thread(site, "the width must be a power of two of at most 32.");
  }
  Value given{};
  std::memcpy(given.bytes, &value, sizeof(T));
  const Thread& thread = meet(site, mask, source, given, false);
  std::memcpy(&value, thread.taken.bytes, sizeof(T));
  return value;
}

inline int lane() {
  return machine.running->rank % kWarp;
}

template <typename T>
T shuffle_xor(const Site& site, unsigned mask, T value, int bits, int width = kWarp) {
  const int source = lane() ^ bits;
  return shuffle(site, mask, value, source / width > lane() / width ? lane() : source, width);
}

template <typename T>
T shuffle_down(const Site& site, unsigned mask, T value, unsigned delta, int width = kWarp) {
  const bool inside = lane() % width + delta < unsigned(width);
  return shuffle(site, mask, value, inside ? lane() + int(delta) : lane(), width);
}

template <typename T>
T shuffle_up(const Site& site, unsigned mask, T value, unsigned delta, int width = kWarp) {
  const bool inside = unsigned(lane() % width) >= delta;
  return shuffle(site, mask, value, inside ? lane() - int(delta) : lane(), width);
}

template <typename T>
T shuffle_from(const Site& site, unsigned mask, T value, int source, int width = kWarp) {
  return shuffle(site, mask, value, lane() / width * width + (source & (width - 1)), width);
}

inline unsigned ballot(const Site& site, unsigned mask, bool vote) {
  return meet(site, mask, lane(), Value{}, vote).ballot;
}

inline void sync_warp(const Site& site, unsigned mask = 0xffffffffu) {
  if (!is_dropped(site)) {
    ballot(site, mask, false);
  }
}

// ---------------------------------------------------------------------------------- launching
// Puts items, at first in ascending order, into the order of the next turn.
template <typename Item>
void reorder(std::vector<Item>& items) {
  if (machine.seed > 1) {
    std::shuffle(items.begin(), items.end(), machine.random);
  } else if (machine.seed == 1 && std::is_sorted(items.begin(), items.end())) {
    std::reverse(items.begin(), items.end());
  }
}

// Why no thread can go on, for one that waits.
inline std::string what_holds(const Thread& waiting) {
  const int first = waiting.rank - waiting.rank % kWarp;
  for (const auto& other : machine.threads) {
    const bool expected =
        waiting.state == State::kAtBarrier || (other->rank / kWarp == waiting.rank / kWarp &&
                                               (waiting.mask >> (other->rank - first) & 1));
    const bool there = other->state == waiting.state && other->site == waiting.site &&
                       (waiting.state == State::kAtBarrier || other->mask == waiting.mask);
    if (expected && !there) {
      return "thread " + std::to_string(waiting.rank) + " waits at " + waiting.site.text() +
             ", thread " + std::to_string(other->rank) +
             (other->state == State::kDone ? " has returned." : " at " + other->site.text() + ".");
    }
  }
  return "";
}

// Fills this library's thread-local memory, which is the static shared memory, with NaN.
inline void spoil_static_shared_memory() {
#if !defined(__SANITIZE_ADDRESS__)
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        bool here = false;
        const auto address = reinterpret_cast<uintptr_t>(&machine);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& part = info->dlpi_phdr[i];
          const auto start = info->dlpi_addr + part.p_vaddr;
          here |= part.p_type == PT_LOAD && address >= start && address < start + part.p_memsz;
        }
        for (int i = 0; here && info->dlpi_tls_data && i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type == PT_TLS) {
            std::memset(info->dlpi_tls_data, 0xff, info->dlpi_phdr[i].p_memsz);
          }
        }
        return int(here);
      },
      nullptr);
#endif
}

inline void run_block() {
  spoil_static_shared_memory();
  std::fill(machine.shared.begin(), machine.shared.end(), 0xff);
  std::vector<int> order(machine.threads.size());
  std::iota(order.begin(), order.end(), 0);
  for (const auto& thread : machine.threads) {
    thread->state = State::kReady;
  }
  for (;;) {
    bool advanced = false;
    reorder(order);
    for (const int rank : order) {
      if (machine.threads[rank]->state == State::kReady) {
        advanced = true;
        resume(*machine.threads[rank]);
      }
    }
    if (advanced) {
      continue;
    }
    // Every thread waits or has returned: all at one barrier, or all have returned, or a mistake.
    const Thread& first = *machine.threads[0];
    for (const auto& thread : machine.threads) {
      if (thread->state == State::kInWarp || thread->state != first.state ||
          (first.state == State::kAtBarrier && !(thread->site == first.site))) {
        fail(what_holds(first.state == State::kDone ? *thread : first));
      }
    }
    if (first.state == State::kDone) {
      return;
    }
    for (const auto& thread : machine.threads) {
      thread->state = State::kReady;
    }
  }
}

inline void launch(
    const char* name, dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.name = name;
  machine.ran.insert(name);
  ++machine.launches;
  machine.random.seed(machine.seed);
  const uint64_t count = uint64_t(block.x) * block.y * block.z;
  if (count == 0 || count > 1024 || block.z > 64) {
    fail("CUDA refuses blocks of " + std::to_string(count) + " threads.");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    std::ostringstream size;
    size << grid.x << " x " << grid.y << " x " << grid.z;
    fail("CUDA refuses a grid of " + size.str() + " blocks.");
  }
  if (shared > kMaxSharedBytes) {
    fail("CUDA refuses " + std::to_string(shared) + " bytes of shared memory.");
  }
  machine.grid = grid;
  machine.block = block;
  machine.kernel = &kernel;
  // Of the exact size, so that ASan knows where it ends.
  machine.shared = std::vector<unsigned char>(shared);
  machine.shared.shrink_to_fit();
  machine.threads.resize(count);
  for (int rank = 0; rank < int(count); ++rank) {
    auto& thread = machine.threads[rank];
    if (!thread) {
      thread = std::make_unique<Thread>();
    }
    thread->rank = rank;
    thread->index = {rank % block.x, rank / block.x % block.y, rank / (block.x * block.y)};
  }
  std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  reorder(blocks);
  try {
    for (const uint64_t b : blocks) {
      machine.block_index = {
          unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
      run_block();
    }
  } catch (...) {
    // Threads are stuck inside the kernel: forget them.
    machine.threads.clear();
    machine.failure.clear();
    throw;
  }
}

} // namespace hkd::emulator

// -------------------------------------------------------------------------- CUDA's vocabulary
#if defined(__SANITIZE_ADDRESS__)
#define HKD_STATIC_SHARED static
#else
#define HKD_STATIC_SHARED static thread_local
#endif
#undef __shared__
#define __shared__ HKD_STATIC_SHARED
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#define threadIdx (::hkd::emulator::machine.running->index)
#define blockIdx (::hkd::emulator::machine.block_index)
#define blockDim (::hkd::emulator::machine.block)
#define gridDim (::hkd::emulator::machine.grid)

#define HKD_SITE(operation) (::hkd::emulator::Site{operation, __FILE__, __LINE__})
#define __syncthreads() ::hkd::emulator::sync_threads(HKD_SITE("__syncthreads"))
#define __syncwarp(...) \
  ::hkd::emulator::sync_warp(HKD_SITE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) ::hkd::emulator::shuffle_from(HKD_SITE("__shfl_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) ::hkd::emulator::shuffle_xor(HKD_SITE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) \
  ::hkd::emulator::shuffle_down(HKD_SITE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) ::hkd::emulator::shuffle_up(HKD_SITE("__shfl_up_sync"), __VA_ARGS__)
#define __ballot_sync(mask, vote) ::hkd::emulator::ballot(HKD_SITE("__ballot_sync"), mask, vote)
#define __any_sync(mask, vote) (::hkd::emulator::ballot(HKD_SITE("__any_sync"), mask, vote) != 0)
#define __all_sync(mask, vote) (::hkd::emulator::ballot(HKD_SITE("__all_sync"), mask, !(vote)) == 0)

// Threads change over only where they synchronise, so a plain addition is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

inline float2 atomicAdd(float2* address, float2 value) {
  return {atomicAdd(&address->x, value.x), atomicAdd(&address->y, value.y)};
}

inline float4 atomicAdd(float4* address, float4 value) {
  return {
      atomicAdd(&address->x, value.x),
      atomicAdd(&address->y, value.y),
      atomicAdd(&address->z, value.z),
      atomicAdd(&address->w, value.w)};
}

template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}

template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = value < old ? value : old;
  return old;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
T __ldcs(const T* address) {
  return *address;
}

template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}

inline void __threadfence() {
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(bits);
}

inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

namespace hkd {
using std::max;
using std::min;
} // namespace hkd

#define HKD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream),                                                 \
   ::hkd::emulator::launch(#kernel, grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); }))

#define HKD_DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(::hkd::emulator::machine.shared.data())
