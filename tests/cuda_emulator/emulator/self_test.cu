// Sample kernels, right and wrong, that show what the emulator does and what it detects.
//
//   self_test CASE SEED [FILE LINE]      prints numbers; an exception's text, and 1, otherwise
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "hkd/launch.cuh"

namespace hkd {
namespace {

// --------------------------------------------------------------------------------- right kernels
// Sum of each row by one block: strided reading, shuffles within a warp, shared memory between.
__global__ void __launch_bounds__(128)
    sum_rows(const float* __restrict__ rows, float* __restrict__ sums, int length) {
  __shared__ float partial[4];
  float sum = 0;
  for (int i = threadIdx.x; i < length; i += blockDim.x) {
    sum += rows[int64_t(blockIdx.x) * length + i];
  }
  for (int bits = 16; bits > 0; bits /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  }
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = (partial[0] + partial[1]) + (partial[2] + partial[3]);
  }
}

// Each block turns round its stretch of numbers, through the shared memory of the launch, twice.
__global__ void reverse_twice(float* numbers) {
  HKD_DYNAMIC_SHARED(float, tile);
  float* mine = numbers + blockIdx.x * blockDim.x;
  for (int turn = 0; turn < 2; ++turn) {
    tile[threadIdx.x] = mine[threadIdx.x] + 1;
    __syncthreads();
    mine[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
    __syncthreads();
  }
}

// y += a x in a 16-bit type, computed in float.
template <typename T>
__global__ void axpy(const T* x, T* y, float a, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) {
    y[i] = static_cast<T>(a * static_cast<float>(x[i]) + static_cast<float>(y[i]));
  }
}

// How many numbers are odd, by votes; their sum as float4, by atomics.
__global__ void count_odd(const int* numbers, int* odd, float4* sum) {
  const int number = numbers[blockIdx.x * blockDim.x + threadIdx.x];
  const unsigned votes = __ballot_sync(0xffffffffu, number % 2 != 0);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(odd, __popc(votes));
  }
  atomicAdd(sum, make_float4(number, 1, 0, -number));
}

// Inclusive sums within groups of 8 lanes, the group's last one broadcast, and a neighbour's.
__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  int sum = 1;
  for (unsigned delta = 1; delta < 8; delta *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, delta, 8);
    sum += lane % 8 >= int(delta) ? below : 0;
  }
  const int last = __shfl_sync(0xffffffffu, sum, 7, 8);
  const int next = __shfl_down_sync(0xffffffffu, lane, 1);
  out[lane] = 10000 * sum + 100 * last + next;
  if (lane < 16) {
    out[lane] += 1000000 * __shfl_xor_sync(0x0000ffffu, 1, 1);
  }
  __syncwarp();
}

// -------------------------------------------------------------------------------- wrong kernels
__global__ void returns_before_barrier(float* x) {
  if (threadIdx.x == 5) {
    return;
  }
  __syncthreads();
  x[threadIdx.x] = 1;
}

__global__ void two_barriers(float* x) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  x[threadIdx.x] = 1;
}

__global__ void shuffle_without_a_lane(float* x) {
  if (threadIdx.x != 3) {
    x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  }
}

__global__ void shuffle_from_outside(float* x) {
  if (threadIdx.x < 16) {
    x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
  }
}

__global__ void writes_past_the_end(float* x, int count) {
  const int i = threadIdx.x;
  if (i <= count) {
    x[i] = 1;
  }
}

__global__ void reads_past_static_shared(float* x) {
  __shared__ float tile[64];
  tile[threadIdx.x] = 1;
  __syncthreads();
  x[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void reads_past_dynamic_shared(float* x) {
  HKD_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = 1;
  __syncthreads();
  x[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void reads_unwritten_static_shared(float* x) {
  __shared__ float tile[64];
  if (threadIdx.x < 32) {
    tile[threadIdx.x] = 1;
  }
  __syncthreads();
  x[threadIdx.x] = tile[threadIdx.x];
}

__global__ void reads_unwritten_dynamic_shared(float* x) {
  HKD_DYNAMIC_SHARED(float, tile);
  if (threadIdx.x < 32) {
    tile[threadIdx.x] = 1;
  }
  __syncthreads();
  x[threadIdx.x] = tile[threadIdx.x];
}

// -------------------------------------------------------------------------------------- driver
template <typename T>
void print(const std::vector<T>& numbers) {
  std::cout.precision(9);
  for (const T& number : numbers) {
    std::cout << static_cast<double>(number) << ' ';
  }
  std::cout << '\n';
}

template <typename T>
void run_axpy() {
  std::vector<T> x, y;
  for (int i = 0; i < 70; ++i) {
    x.push_back(T(float(i)));
    y.push_back(T(0.5f));
  }
  HKD_LAUNCH(axpy<T>, 3, 32, 0, nullptr, x.data(), y.data(), 2.0f, 70);
  print(y);
}

void run(const std::string& name) {
  std::vector<float> x(64);
  if (name == "sum_rows") {
    std::vector<float> rows, sums(3);
    for (int i = 0; i < 3 * 301; ++i) {
      rows.push_back(i % 7);
    }
    HKD_LAUNCH(sum_rows, 3, 128, 0, nullptr, rows.data(), sums.data(), 301);
    return print(sums);
  }
  if (name == "reverse_twice") {
    for (int i = 0; i < 64; ++i) {
      x[i] = i;
    }
    HKD_LAUNCH(reverse_twice, 2, 32, 32 * sizeof(float), nullptr, x.data());
  } else if (name == "axpy_half") {
    return run_axpy<__half>();
  } else if (name == "axpy_bfloat16") {
    return run_axpy<__nv_bfloat16>();
  } else if (name == "count_odd") {
    std::vector<int> numbers(96), odd(1);
    for (int i = 0; i < 96; ++i) {
      numbers[i] = i * i % 11;
    }
    std::vector<float4> sum(1);
    HKD_LAUNCH(count_odd, 3, 32, 0, nullptr, numbers.data(), odd.data(), sum.data());
    return print(std::vector<float>{float(odd[0]), sum[0].x, sum[0].y, sum[0].z, sum[0].w});
  } else if (name == "shuffles") {
    std::vector<int> out(32);
    HKD_LAUNCH(shuffles, 1, 32, 0, nullptr, out.data());
    return print(out);
  } else if (name == "returns_before_barrier") {
    HKD_LAUNCH(returns_before_barrier, 1, 64, 0, nullptr, x.data());
  } else if (name == "two_barriers") {
    HKD_LAUNCH(two_barriers, 1, 64, 0, nullptr, x.data());
  } else if (name == "shuffle_without_a_lane") {
    HKD_LAUNCH(shuffle_without_a_lane, 1, 64, 0, nullptr, x.data());
  } else if (name == "shuffle_from_outside") {
    HKD_LAUNCH(shuffle_from_outside, 1, 64, 0, nullptr, x.data());
  } else if (name == "writes_past_the_end") {
    x.resize(50);
    x.shrink_to_fit();
    HKD_LAUNCH(writes_past_the_end, 1, 64, 0, nullptr, x.data(), 50);
  } else if (name == "reads_past_static_shared") {
    HKD_LAUNCH(reads_past_static_shared, 1, 64, 0, nullptr, x.data());
  } else if (name == "reads_past_dynamic_shared") {
    HKD_LAUNCH(reads_past_dynamic_shared, 1, 64, 64 * sizeof(float), nullptr, x.data());
  } else if (name == "reads_unwritten_static_shared") {
    HKD_LAUNCH(reads_unwritten_static_shared, 1, 64, 0, nullptr, x.data());
  } else if (name == "reads_unwritten_dynamic_shared") {
    HKD_LAUNCH(reads_unwritten_dynamic_shared, 1, 64, 64 * sizeof(float), nullptr, x.data());
  } else if (name == "empty_grid") {
    HKD_LAUNCH(two_barriers, 0, 64, 0, nullptr, x.data());
  } else if (name == "tall_grid") {
    HKD_LAUNCH(two_barriers, dim3(1, 65536), 64, 0, nullptr, x.data());
  } else if (name == "wide_block") {
    HKD_LAUNCH(two_barriers, 1, 2048, 0, nullptr, x.data());
  } else if (name == "much_shared") {
    HKD_LAUNCH(two_barriers, 1, 64, 49153, nullptr, x.data());
  } else {
    throw std::runtime_error("no such case");
  }
  print(x);
}

} // namespace
} // namespace hkd

int main(int argc, char** argv) {
  hkd::emulator::machine.seed = std::atoi(argv[2]);
  if (argc > 4) {
    hkd::emulator::machine.dropped_file = argv[3];
    hkd::emulator::machine.dropped_line = std::atoi(argv[4]);
  }
  try {
    hkd::run(argv[1]);
  } catch (const std::exception& error) {
    std::cout << error.what() << '\n';
    return 1;
  }
  return 0;
}
