// The schema of every compiled operator, and the Python module that carries them.
//
// Kernels register themselves beside their code. Autograd and fake kernels are in Python
// (hkd_d2/ops), because LibTorch's stable ABI has no autograd.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// Importing the module loads the library; that registers the operators. Nothing else is in it.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

STABLE_TORCH_LIBRARY(hkd_d2, m) {
  // Logits are (R, K), weights (R,) in the dtype of the loss.
  m.def(
      "kl_distillation_loss(Tensor student_logits, Tensor teacher_logits, Tensor? weights, "
      "float temperature, bool sigmoid) -> Tensor");
  m.def(
      "kl_distillation_loss_backward(Tensor grad, Tensor student_logits, Tensor teacher_logits, "
      "Tensor? weights, float temperature, bool sigmoid) -> Tensor");
}
