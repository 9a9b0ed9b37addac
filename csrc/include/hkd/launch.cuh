// What a .cu file needs to be CUDA under nvcc and a test's emulation under g++: the launch and the
// dynamic shared memory. Everything else in a kernel is plain CUDA.
//
//   HKD_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
//   HKD_LAUNCH((kernel<float, 4>), ...)          a name with a comma goes in parentheses
//   HKD_DYNAMIC_SHARED(float, tile)              float* tile: the bytes that the launch gave
//
// A launch that CUDA refuses throws std::runtime_error; a grid must not be empty.
#pragma once

#if defined(HKD_EMULATE_CUDA)
#include "emulator.h" // tests/csrc/emulator
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace hkd {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(
        std::string("Kernel ") + kernel + " was not launched: " + cudaGetErrorString(error) + ".");
  }
}

} // namespace hkd

#define HKD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__), ::hkd::check_launch(#kernel))

#define HKD_DYNAMIC_SHARED(T, name)                           \
  extern __shared__ __align__(16) unsigned char hkd_shared[]; \
  T* name = reinterpret_cast<T*>(hkd_shared)
#endif
