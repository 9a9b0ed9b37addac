// Sums over a block and over blocks: the same numbers are added in the same order in every run.
#pragma once

#include "hkd/launch.cuh"

namespace hkd {

constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over groups of `width` neighbouring lanes, in each of them.
template <typename T>
__device__ __forceinline__ T lane_sum(T value, int width = 32) {
  for (int bits = width / 2; bits > 0; bits /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, bits);
  }
  return value;
}

// The maximum over groups of `width` neighbouring lanes; NaN does not count.
template <typename T>
__device__ __forceinline__ T lane_max(T value, int width = 32) {
  for (int bits = width / 2; bits > 0; bits /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, bits);
    value = other > value ? other : value;
  }
  return value;
}

// The sums of kCount values over a block of kThreads, in every thread. Called once a kernel.
template <int kThreads, int kCount, typename T>
__device__ __forceinline__ void block_sums(T (&values)[kCount]) {
  constexpr int kWarps = kThreads / 32;
  __shared__ T partial[kCount][kWarps];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const T sum = lane_sum(values[k]);
    if (threadIdx.x % 32 == 0) {
      partial[k][threadIdx.x / 32] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = partial[k][0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      values[k] += partial[k][w];
    }
  }
}

} // namespace hkd
