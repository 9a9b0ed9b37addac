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
  // Maps are (N, C, H, W), one a level; an empty list is an option that is not used. Adapters lie
  // in two lists without repetitions, and a level names its place in each, or -1. `saved` has what
  // backward reads again, one a level, and last the scales of the levels.
  m.def(
      "feature_imitation_loss(Tensor[] student, Tensor[] teacher, Tensor[] adapter_weights, "
      "Tensor[] adapter_biases, Tensor[] boxes, Tensor[] ignore_boxes, Tensor[] anchors, "
      "Tensor[] spatial_weights, Tensor[] channel_weights, Tensor? level_weights, "
      "int[] weight_of_level, int[] bias_of_level, float[] strides, int distance, bool masked, "
      "float foreground_weight, float background_weight, bool area_weights, "
      "bool assign_ignore_all, int rasterize, float anchor_offset, float anchor_threshold) "
      "-> (Tensor loss, Tensor[] saved)");
  m.def(
      "feature_imitation_loss_backward(Tensor grad, Tensor[] student, Tensor[] teacher, "
      "Tensor[] adapter_weights, Tensor[] adapter_biases, Tensor[] channel_weights, "
      "Tensor[] saved, int[] weight_of_level, int[] bias_of_level, int distance) "
      "-> (Tensor[] student, Tensor[] adapter_weights, Tensor[] adapter_biases)");

  // Regions. A map is (N, C, H, W), one a level; boxes are (R, 4), one list an image. Backward has
  // the same bits in every run where `deterministic` asks for it.
  m.def(
      "multilevel_roi_align(Tensor[] features, Tensor[] boxes, float[] strides, int rows, "
      "int columns, int sampling_ratio) -> Tensor");
  m.def(
      "multilevel_roi_align_backward(Tensor grad, Tensor[] boxes, float[] strides, "
      "int sampling_ratio, int[] heights, int[] widths, bool[] channels_last, bool deterministic) "
      "-> Tensor[]");
  // An adapter of level l is weights[weight_of_level[l]] (C_t, C_s) and biases[bias_of_level[l]]
  // (C_t,), -1 for none. `distance` is a Distance of hkd/distances.h.
  m.def(
      "roi_distillation_loss(Tensor[] student, Tensor[] teacher, Tensor[] boxes, Tensor[] weights, "
      "Tensor[] biases, int[] weight_of_level, int[] bias_of_level, float[] strides, int rows, "
      "int columns, int sampling_ratio, int distance) -> Tensor");
  m.def(
      "roi_distillation_loss_backward(Tensor grad, Tensor[] student, Tensor[] teacher, "
      "Tensor[] boxes, Tensor[] weights, Tensor[] biases, int[] weight_of_level, "
      "int[] bias_of_level, float[] strides, int rows, int columns, int sampling_ratio, "
      "int distance, bool deterministic) -> (Tensor[], Tensor[], Tensor[])");

  // Logit distillation. Lists have one tensor a level or image; an empty list is an argument that
  // was not given. Logits are (..., K), weights (...) and class_weights (K,), both in the dtype of
  // the loss. A second output is what the loss was divided by; it has no gradient.
  m.def(
      "kl_distillation_loss(Tensor[] student_logits, Tensor[] teacher_logits, Tensor[] weights, "
      "float temperature, bool sigmoid) -> (Tensor loss, Tensor normalizer)");
  m.def(
      "kl_distillation_loss_backward(Tensor grad, Tensor normalizer, Tensor[] student_logits, "
      "Tensor[] teacher_logits, Tensor[] weights, float temperature, bool sigmoid) -> Tensor[]");
  m.def(
      "soft_cross_entropy_loss(Tensor[] student_logits, Tensor[] teacher_logits, "
      "Tensor[] weights, Tensor? class_weights, float temperature, bool sigmoid) "
      "-> (Tensor loss, Tensor normalizer)");
  m.def(
      "soft_cross_entropy_loss_backward(Tensor grad, Tensor normalizer, Tensor[] student_logits, "
      "Tensor[] teacher_logits, Tensor[] weights, Tensor? class_weights, float temperature, "
      "bool sigmoid) -> Tensor[]");
  // Without theta the loss is not divided.
  m.def(
      "adaptive_distillation_loss(Tensor[] student_logits, Tensor[] teacher_probs, "
      "Tensor[] ignore, float gamma, float alpha, float beta_c, float? theta, bool kl) "
      "-> (Tensor loss, Tensor normalizer)");
  m.def(
      "adaptive_distillation_loss_backward(Tensor grad, Tensor normalizer, "
      "Tensor[] student_logits, Tensor[] teacher_probs, Tensor[] ignore, float gamma, "
      "float alpha, float beta_c, bool kl) -> Tensor[]");
  // Deltas are (R, D). The normaliser is the tensor or, where there is none, the number.
  m.def(
      "bounded_regression_loss(Tensor student_deltas, Tensor teacher_deltas, "
      "Tensor target_deltas, float margin, Tensor? normalizer, float number) -> Tensor");
  m.def(
      "bounded_regression_loss_backward(Tensor grad, Tensor student_deltas, "
      "Tensor teacher_deltas, Tensor target_deltas, float margin, Tensor? normalizer, "
      "float number) -> Tensor");
}
