// csrc/evaluation as functions of hkd_d2._native.
#pragma once

#include <pybind11/pybind11.h>

namespace hkd {

void bind_evaluation(pybind11::module_& module);

} // namespace hkd
