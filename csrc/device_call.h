// Where the kernels of a call run: on the device of its tensors, on PyTorch's current stream.
//
// With HKD_EMULATE_CUDA, which tests define, the kernels' text runs on the CPU and takes the place
// of the CPU kernels: HKD_DEVICE is the dispatch key to register for.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "dispatch.h"
#include "hkd/storage.h"

#if defined(HKD_EMULATE_CUDA)
#include "emulator.h" // tests/csrc/emulator
#define HKD_DEVICE CPU
#else
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define HKD_DEVICE CUDA
#endif

namespace hkd {

// Hidden, as the guard that it holds is.
class __attribute__((visibility("hidden"))) DeviceCall {
 public:
#if defined(HKD_EMULATE_CUDA)
  explicit DeviceCall(const torch::stable::Tensor&) {
  }
  cudaStream_t stream() const {
    return nullptr;
  }
#else
  explicit DeviceCall(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_) {
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline Storage storage_of(const char* name, ScalarType type) {
  Storage storage{};
  dispatch_floating(type, name, [&](auto) {
    storage = type == ScalarType::Double  ? Storage::kDouble
              : type == ScalarType::Float ? Storage::kFloat
              : type == ScalarType::Half  ? Storage::kHalf
                                          : Storage::kBFloat16;
  });
  return storage;
}

// The elements of a tensor that lies in memory without gaps.
inline Numbers numbers_to_read(const char* name, const torch::stable::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), storage_of(name, tensor.scalar_type())};
}

inline Numbers numbers_to_write(const torch::stable::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), storage_of("the result", tensor.scalar_type())};
}

} // namespace hkd
