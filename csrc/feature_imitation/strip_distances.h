// Distances and gradients of strips of numbers, for with_best_isa.
//
// What has no sum is a plain loop, which the compiler vectorises. Sums are written with its vector
// type, since the order of additions is not its to change; vectors go by reference because their
// calling convention depends on the target. Sums of at most kSumLength terms a lane are taken in
// Acc, everything above in double.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hkd/distances.h"

namespace hkd {

constexpr int64_t kSumLength = 4096;

template <typename T, int kLanes>
struct LanesOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};

// kLanes numbers that are added, multiplied and compared at once.
template <typename T, int kLanes>
using Lanes = typename LanesOf<T, kLanes>::type;

template <typename V, typename T>
inline void load(const T* from, V& to) {
  std::memcpy(&to, from, sizeof(to));
}

template <typename Acc, int kLanes>
struct LaneSum {
  Lanes<Acc, kLanes> lanes = {};

  Acc total() const {
    Acc numbers[kLanes];
    std::memcpy(numbers, &lanes, sizeof(lanes));
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) {
        numbers[l] += numbers[l + half];
      }
    }
    return numbers[0];
  }
};

// Some strips of as many numbers, `stride` apart.
template <typename Acc>
struct Strips {
  const Acc* first;
  int64_t stride;
};

// Adds sum_i weights_i distance(s_i, t_i) to the sum of each strip; terms of weight 0 are 0 even
// where the distance is NaN.
template <Distance kind, bool weighted, int strips, int kLanes, typename Acc>
inline void add_distances(
    Strips<Acc> s, Strips<Acc> t, const Acc* weights, int64_t n, LaneSum<Acc, kLanes>* sums) {
  const auto term = [&](int strip, int64_t i, auto& sum) {
    using V = std::remove_reference_t<decltype(sum)>;
    V a, b, distance;
    load(s.first + strip * s.stride + i, a);
    load(t.first + strip * t.stride + i, b);
    const V difference = a - b;
    element_distance<kind>(difference, distance);
    if constexpr (weighted) {
      V weight;
      load(weights + i, weight);
      const V zero = {};
      sum += weight != 0 ? weight * distance : zero;
    } else {
      sum += distance;
    }
  };
  Lanes<Acc, kLanes> lanes[strips]; // stay in registers
  for (int strip = 0; strip < strips; ++strip) {
    lanes[strip] = sums[strip].lanes;
  }
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 8
    for (int strip = 0; strip < strips; ++strip) {
      term(strip, i, lanes[strip]);
    }
  }
  for (int strip = 0; strip < strips; ++strip) {
    sums[strip].lanes = lanes[strip];
  }
  if (i < n) {
    for (int strip = 0; strip < strips; ++strip) {
      Acc rest = 0;
      for (int64_t j = i; j < n; ++j) {
        term(strip, j, rest);
      }
      sums[strip].lanes[0] += rest;
    }
  }
}

template <Distance kind, bool weighted, int kLanes, typename Acc>
inline double sum_distances(const Acc* s, const Acc* t, const Acc* weights, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kSumLength) {
    LaneSum<Acc, kLanes> part;
    add_distances<kind, weighted, 1>(
        Strips<Acc>{s + i, 0},
        Strips<Acc>{t + i, 0},
        weights + (weighted ? i : 0),
        std::min(kSumLength, n - i),
        &part);
    sum += part.total();
  }
  return sum;
}

// out_i = scale weights_i d distance(s_i, t_i) / d s_i, 0 where the weight is 0. `out` may be s.
template <Distance kind, bool weighted, typename Acc>
inline void distance_gradient(
    const Acc* s, const Acc* t, const Acc* weights, Acc scale, int64_t n, Acc* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Acc slope = element_slope<kind>(s[i] - t[i]);
    if constexpr (weighted) {
      out[i] = weights[i] != 0 ? scale * weights[i] * slope : Acc(0);
    } else {
      out[i] = scale * slope;
    }
  }
}

// out_i = student (s_i - s_mean) + teacher (t_i - t_mean) with factors of the whole strip. `out`
// may be s.
template <typename Acc>
inline void affine_gradient(
    const Acc* s,
    const Acc* t,
    Acc s_mean,
    Acc t_mean,
    Acc student,
    Acc teacher,
    int64_t n,
    Acc* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    out[i] = student * (s[i] - s_mean) + teacher * (t[i] - t_mean);
  }
}

// The same times `scale` with means and factors of every number: four rows of numbers, `stride`
// apart.
template <typename Acc>
inline void affine_gradient(
    const Acc* s,
    const Acc* t,
    const Acc* coefficients,
    int64_t stride,
    Acc scale,
    int64_t n,
    Acc* out) {
  const Acc* s_mean = coefficients;
  const Acc* t_mean = coefficients + stride;
  const Acc* student = coefficients + 2 * stride;
  const Acc* teacher = coefficients + 3 * stride;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    out[i] = scale * (student[i] * (s[i] - s_mean[i]) + teacher[i] * (t[i] - t_mean[i]));
  }
}

// out_i = scale (student_i s_i + teacher_i t_i), 0 where both factors are.
template <typename Acc>
inline void linear_gradient(
    const Acc* s,
    const Acc* t,
    const Acc* student,
    const Acc* teacher,
    Acc scale,
    int64_t n,
    Acc* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Acc sum = scale * (student[i] * s[i] + teacher[i] * t[i]);
    out[i] = student[i] != 0 || teacher[i] != 0 ? sum : Acc(0);
  }
}

// Sums of s t, s s and t t.
template <int kLanes, typename Acc>
inline void products(const Acc* s, const Acc* t, int64_t n, Acc& st, Acc& ss, Acc& tt) {
  LaneSum<Acc, kLanes> sums[3];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Lanes<Acc, kLanes> a, b;
    load(s + i, a);
    load(t + i, b);
    sums[0].lanes += a * b;
    sums[1].lanes += a * a;
    sums[2].lanes += b * b;
  }
  st = sums[0].total();
  ss = sums[1].total();
  tt = sums[2].total();
  for (; i < n; ++i) {
    st += s[i] * t[i];
    ss += s[i] * s[i];
    tt += t[i] * t[i];
  }
}

// Adds the products of n cells of one channel to sums that lie as three rows of n.
template <typename Acc>
inline void add_products(const Acc* s, const Acc* t, int64_t n, Acc* sums) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    sums[i] += s[i] * t[i];
    sums[n + i] += s[i] * s[i];
    sums[2 * n + i] += t[i] * t[i];
  }
}

// Sums over n cells of a channel less the pivot, its first cell: s, t, s s, t t and s t. The pivot
// is one of the cells, so that squares cannot exceed the spread by more than n: nothing cancels.
template <int kLanes, typename Acc>
inline Moments<double> moments_of_plane(const Acc* s, const Acc* t, int64_t n) {
  LaneSum<Acc, kLanes> sums[5];
  Acc rest[5] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Lanes<Acc, kLanes> ds, dt;
    load(s + i, ds);
    load(t + i, dt);
    ds -= s[0];
    dt -= t[0];
    sums[0].lanes += ds;
    sums[1].lanes += dt;
    sums[2].lanes += ds * ds;
    sums[3].lanes += dt * dt;
    sums[4].lanes += ds * dt;
  }
  for (; i < n; ++i) {
    const Acc ds = s[i] - s[0], dt = t[i] - t[0];
    rest[0] += ds;
    rest[1] += dt;
    rest[2] += ds * ds;
    rest[3] += dt * dt;
    rest[4] += ds * dt;
  }
  double total[5];
  for (int k = 0; k < 5; ++k) {
    total[k] = static_cast<double>(sums[k].total()) + rest[k];
  }
  const double count = static_cast<double>(n);
  return {
      count,
      s[0] + total[0] / count,
      t[0] + total[1] / count,
      std::max(total[2] - total[0] * total[0] / count, 0.0),
      std::max(total[3] - total[1] * total[1] / count, 0.0),
      total[4] - total[0] * total[1] / count};
}

// The same for every channel of a strip of cells, merged into moments that lie as five rows of
// numbers, one a channel. `sums` holds 5 * channels numbers.
template <typename Acc>
inline void add_moments_of_cells(
    const Acc* s,
    const Acc* t,
    int64_t n,
    int64_t channels,
    Acc* sums,
    double* moments,
    double count) {
  Acc* const s_sum = sums;
  Acc* const t_sum = sums + channels;
  Acc* const ss_sum = sums + 2 * channels;
  Acc* const tt_sum = sums + 3 * channels;
  Acc* const st_sum = sums + 4 * channels;
  std::fill_n(sums, 5 * channels, Acc(0));
  for (int64_t i = 1; i < n; ++i) {
    const Acc* si = s + i * channels;
    const Acc* ti = t + i * channels;
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const Acc ds = si[c] - s[c], dt = ti[c] - t[c];
      s_sum[c] += ds;
      t_sum[c] += dt;
      ss_sum[c] += ds * ds;
      tt_sum[c] += dt * dt;
      st_sum[c] += ds * dt;
    }
  }
  double* const s_mean = moments;
  double* const t_mean = moments + channels;
  double* const ss = moments + 2 * channels;
  double* const tt = moments + 3 * channels;
  double* const st = moments + 4 * channels;
  const double added = static_cast<double>(n), share = added / (count + added);
  const double factor = count * share;
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    const double ds = s_sum[c] / added, dt = t_sum[c] / added; // means less the pivot
    const double to_s = s[c] + ds - s_mean[c], to_t = t[c] + dt - t_mean[c];
    const double own_ss = ss_sum[c] - ds * s_sum[c], own_tt = tt_sum[c] - dt * t_sum[c];
    s_mean[c] += to_s * share;
    t_mean[c] += to_t * share;
    ss[c] += (own_ss < 0 ? 0 : own_ss) + to_s * to_s * factor;
    tt[c] += (own_tt < 0 ? 0 : own_tt) + to_t * to_t * factor;
    st[c] += st_sum[c] - ds * t_sum[c] + to_s * to_t * factor;
  }
}

} // namespace hkd
