// One row of the temperature-scaled KL divergence and its gradient.
//
// S and T are the stored types of the student's and the teacher's logits, Acc the type that a class
// is computed in (float, or double for double logits), Sum the type that classes are added up in.
// Needs no torch header, so that host and device share it. A NaN passes through.
#pragma once

#include <cmath>
#include <cstdint>

#include "hkd/macros.h"

namespace hkd {

template <typename Acc, typename T>
HKD_HD Acc row_max(const T* row, int64_t classes) {
  Acc max = -INFINITY;
  for (int64_t k = 0; k < classes; ++k) {
    const Acc x = static_cast<Acc>(row[k]);
    max = x > max ? x : max;
  }
  return max;
}

// sum_k q_k (ln q_k - ln p_k) with p, q = softmax(logits / temperature).
//
// With s, t the scaled logits less their maximum and q_k = e^{t_k} / sum_t, this is
// sum_k e^{t_k} (t_k - s_k) / sum_t + ln sum_s - ln sum_t: one pass with two exponentials a class.
template <typename Acc, typename Sum, typename S, typename T>
HKD_HD Sum softmax_kl(const S* student, const T* teacher, int64_t classes, Acc temperature) {
  const Acc s_max = row_max<Acc>(student, classes);
  const Acc t_max = row_max<Acc>(teacher, classes);
  Sum s_sum = 0, t_sum = 0, weighted = 0;
  for (int64_t k = 0; k < classes; ++k) {
    const Acc s = (static_cast<Acc>(student[k]) - s_max) / temperature;
    const Acc t = (static_cast<Acc>(teacher[k]) - t_max) / temperature;
    const Acc t_exp = std::exp(t);
    s_sum += std::exp(s);
    t_sum += t_exp;
    // A class that the teacher excludes contributes 0, not 0 times infinity.
    weighted += t_exp == 0 ? Acc(0) : t_exp * (t - s);
  }
  return classes == 0 ? Sum(0) : weighted / t_sum + std::log(s_sum) - std::log(t_sum);
}

// Gradient of scale * temperature * KL with respect to the student's logits: scale (p - q).
// `scratch` holds 2 * classes numbers.
template <typename Acc, typename Sum, typename S, typename T>
HKD_HD void softmax_kl_backward(
    const S* student,
    const T* teacher,
    S* gradient,
    Acc* scratch,
    int64_t classes,
    Acc temperature,
    Acc scale) {
  const Acc s_max = row_max<Acc>(student, classes);
  const Acc t_max = row_max<Acc>(teacher, classes);
  Acc* s_exp = scratch;
  Acc* t_exp = scratch + classes;
  Sum s_sum = 0, t_sum = 0;
  for (int64_t k = 0; k < classes; ++k) {
    s_exp[k] = std::exp((static_cast<Acc>(student[k]) - s_max) / temperature);
    t_exp[k] = std::exp((static_cast<Acc>(teacher[k]) - t_max) / temperature);
    s_sum += s_exp[k];
    t_sum += t_exp[k];
  }
  const Acc s_total = static_cast<Acc>(s_sum), t_total = static_cast<Acc>(t_sum);
  for (int64_t k = 0; k < classes; ++k) {
    gradient[k] = static_cast<S>(scale * (s_exp[k] / s_total - t_exp[k] / t_total));
  }
}

// sigmoid(z), sigmoid(-z) and their logarithms, finite for every finite z.
template <typename Acc>
struct Bernoulli {
  Acc p, not_p, log_p, log_not_p;

  HKD_HD explicit Bernoulli(Acc z) {
    const Acc small = std::exp(-std::abs(z));
    const Acc rest = std::log1p(small);
    p = (z < 0 ? small : Acc(1)) / (1 + small);
    not_p = (z < 0 ? Acc(1) : small) / (1 + small);
    log_p = (z < 0 ? z : Acc(0)) - rest;
    log_not_p = (z < 0 ? Acc(0) : -z) - rest;
  }
};

// sum_k of the KL divergences of one Bernoulli variable a class.
template <typename Acc, typename Sum, typename S, typename T>
HKD_HD Sum sigmoid_kl(const S* student, const T* teacher, int64_t classes, Acc temperature) {
  Sum sum = 0;
  for (int64_t k = 0; k < classes; ++k) {
    const Bernoulli<Acc> s(static_cast<Acc>(student[k]) / temperature);
    const Bernoulli<Acc> t(static_cast<Acc>(teacher[k]) / temperature);
    sum += t.p == 0 ? Acc(0) : t.p * (t.log_p - s.log_p);
    sum += t.not_p == 0 ? Acc(0) : t.not_p * (t.log_not_p - s.log_not_p);
  }
  return sum;
}

template <typename Acc>
HKD_HD Acc sigmoid(Acc z) {
  return 1 / (1 + std::exp(-z));
}

template <typename Acc, typename S, typename T>
HKD_HD void sigmoid_kl_backward(
    const S* student, const T* teacher, S* gradient, int64_t classes, Acc temperature, Acc scale) {
  for (int64_t k = 0; k < classes; ++k) {
    const Acc p = sigmoid(static_cast<Acc>(student[k]) / temperature);
    const Acc q = sigmoid(static_cast<Acc>(teacher[k]) / temperature);
    gradient[k] = static_cast<S>(scale * (p - q));
  }
}

} // namespace hkd
