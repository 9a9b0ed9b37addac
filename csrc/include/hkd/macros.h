// Marks functions that run on the host and, compiled by nvcc, on the device. Needs no torch header.
#pragma once

#if defined(__CUDACC__)
#define HKD_HD __host__ __device__ inline
#else
#define HKD_HD inline
#endif
