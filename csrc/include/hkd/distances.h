// Distances between the features of student and teacher, and what their gradients are made of.
// Needs no torch header.
#pragma once

#include <cmath>
#include <cstdint>

#include "hkd/macros.h"

namespace hkd {

// The codes are the places in DISTANCES of hkd_d2/ops/_checks.py.
enum class Distance : int { kMse, kL1, kSmoothL1, kCosine, kPkd };

// -------------------------------------------------------- element by element: kMse to kSmoothL1
// Distance of two numbers from their difference d = student - teacher. T may be a vector type of
// the compiler's, which goes by reference because its calling convention depends on the target.
template <Distance kind, typename T>
HKD_HD void element_distance(const T& d, T& distance) {
  if constexpr (kind == Distance::kMse) {
    distance = d * d;
  } else {
    const T size = d < 0 ? -d : d;
    if constexpr (kind == Distance::kL1) {
      distance = size;
    } else {
      const T quadratic = 0.5f * d * d, linear = size - 0.5f;
      distance = size < 1 ? quadratic : linear;
    }
  }
}

// Its derivative with respect to the student.
template <Distance kind, typename T>
HKD_HD T element_slope(T d) {
  if constexpr (kind == Distance::kMse) {
    return 2 * d;
  } else if constexpr (kind == Distance::kL1) {
    return d > 0 ? T(1) : (d < 0 ? T(-1) : T(0));
  } else {
    return d > 1 ? T(1) : (d < -1 ? T(-1) : d);
  }
}

// -------------------------------------------------------- kCosine: over the channels of a cell
// 1 - cos(s, t) and its gradient, student * s + teacher * t.
template <typename T>
struct CosineCell {
  T distance, student, teacher;
};

// From the sums s.t, s.s and t.t. Norms are clamped to 1e-8 as torch.cosine_similarity does.
template <typename T>
HKD_HD CosineCell<T> cosine_cell(T st, T ss, T tt) {
  const T s_norm = std::sqrt(ss), t_norm = std::sqrt(tt), smallest = T(1e-8);
  const T s_clamped = s_norm < smallest ? smallest : s_norm;
  const T t_clamped = t_norm < smallest ? smallest : t_norm;
  const T cosine = st / (s_clamped * t_clamped);
  return {
      1 - cosine, s_norm == 0 ? T(0) : cosine / (s_clamped * s_norm), -1 / (s_clamped * t_clamped)};
}

// -------------------------------------------------------- kPkd: correlation of a channel
// Count, means and centred sums of products of a channel of both sides over some cells.
template <typename T>
struct Moments {
  T count, s_mean, t_mean, ss, tt, st;

  // Joins the moments of other cells (Chan, Golub and LeVeque 1979).
  HKD_HD void merge(const Moments& other) {
    if (other.count == 0) {
      return;
    }
    const T total = count + other.count, share = other.count / total;
    const T ds = other.s_mean - s_mean, dt = other.t_mean - t_mean;
    s_mean += ds * share;
    t_mean += dt * share;
    ss += other.ss + ds * ds * (count * share);
    tt += other.tt + dt * dt * (count * share);
    st += other.st + ds * dt * (count * share);
    count = total;
  }
};

// Loss of a channel, mean of (s' - t')^2 / 2 over its cells with both sides standardised, and its
// gradient: student * (s - s_mean) + teacher * (t - t_mean).
//
// With D = deviation + 1e-6, n cells and r = s' - t', which has mean 0, the gradient is
// r / (n D_s) - (s - s_mean) (sum_j r_j (s_j - s_mean)) / (n (n - 1) deviation_s D_s^2).
template <typename T>
struct PkdChannel {
  T loss, student, teacher;
};

template <typename T>
HKD_HD PkdChannel<T> pkd_channel(const Moments<T>& m) {
  const T n = m.count, freedom = n > 1 ? n - 1 : T(1);
  const T s_deviation = std::sqrt(m.ss / freedom), t_deviation = std::sqrt(m.tt / freedom);
  const T s_scale = s_deviation + T(1e-6), t_scale = t_deviation + T(1e-6);
  const T ss = m.ss / (s_scale * s_scale), tt = m.tt / (t_scale * t_scale);
  const T st = m.st / (s_scale * t_scale);
  // The deviation of a constant channel has no slope; autograd takes 0 as well.
  const T through_deviation =
      s_deviation == 0 ? T(0) : (ss - st) / (n * freedom * s_deviation * s_scale);
  return {
      (ss + tt - 2 * st) / (2 * n),
      1 / (n * s_scale * s_scale) - through_deviation,
      -1 / (n * s_scale * t_scale)};
}

} // namespace hkd
