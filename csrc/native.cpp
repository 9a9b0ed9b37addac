// hkd_d2._native: what is not a tensor operator. Needs no PyTorch.
#include <pybind11/pybind11.h>

#include "cpu_isa.h"
#include "evaluation/bindings.h"

namespace py = pybind11;

namespace hkd {
namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["cxx_standard"] = __cplusplus / 100 % 100;
  info["flags"] = HKD_BUILD_FLAGS;
  info["built_for_torch"] = HKD_BUILD_TORCH;
#if defined(HKD_BUILD_CUDA)
  info["cuda"] = HKD_BUILD_CUDA;
  info["cuda_architectures"] = HKD_BUILD_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  py::list compiled;
  for (const char* name : kIsaNames) {
    compiled.append(name);
  }
  info["cpu_isas"] = compiled;
  info["cpu_isa"] = kIsaNames[static_cast<int>(best_isa())];
  return info;
}

} // namespace
} // namespace hkd

PYBIND11_MODULE(_native, m) {
  m.doc() = "What is compiled and is not a tensor operator.";
  m.def("build_info", &hkd::build_info, "How the compiled modules were built; see hkd_d2.ops.");
  hkd::bind_evaluation(m);
}
