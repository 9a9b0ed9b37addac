// The two loops that RoI pooling consists of, for vectors of `kLanes` numbers: a weighted sum of
// rows, and the transposition of a small matrix.
//
// Written with GCC's vector extension (clang has it too), because the compiler does not keep the
// sums of a weighted sum in registers by itself. To be called from with_lanes, which inlines
// them; vectors are passed by reference because their calling convention depends on the target.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu_isa.h"
#include "hkd/axis_weights.h"

namespace hkd {

// Calls body(lanes) compiled for the best instruction set, with the lanes of a register. Double is
// for checks of gradients, not for speed: the baseline will do.
template <typename Acc, typename Body>
void with_lanes(const Body& body) {
  if constexpr (std::is_same_v<Acc, float>) {
    with_best_isa(body);
  } else {
    body(std::integral_constant<int, 2>{});
  }
}

template <typename T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};

template <typename T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;

template <int kLanes, typename Acc, typename T>
inline void load(const T* from, Vector<Acc, kLanes>& to) {
  if constexpr (std::is_same_v<T, Acc>) {
    std::memcpy(&to, from, sizeof(to));
  } else {
    Acc numbers[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      numbers[i] = static_cast<Acc>(from[i]);
    }
    std::memcpy(&to, numbers, sizeof(to));
  }
}

template <typename V, typename Acc>
inline void store(const V& from, Acc* to) {
  std::memcpy(to, &from, sizeof(from));
}

// A weighted sum of rows of `T`: sum_k weight_k * x_k, where x_k is rows + index_k * row_stride,
// less the same of `minus` if `pair`, times the sign. It is added to `out` if `add`.
template <typename Acc, typename T, bool pair>
struct WeightedSum {
  const T* rows;
  const T* minus;
  int64_t row_stride;
  Taps<Acc> taps;
  Acc sign;
  bool add;
  Acc* out;

  // Four vectors, `stride` apart in the rows and `out_stride` apart in the sum.
  template <int kLanes>
  void four(int64_t at, int64_t stride, int64_t out_at, int64_t out_stride) const {
    Vector<Acc, kLanes> sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
    Acc* to = out + out_at;
    if (add) {
      load<kLanes, Acc>(to, sum0);
      load<kLanes, Acc>(to + out_stride, sum1);
      load<kLanes, Acc>(to + 2 * out_stride, sum2);
      load<kLanes, Acc>(to + 3 * out_stride, sum3);
    }
    for (int k = 0; k < taps.count; ++k) {
      const int64_t row = taps.first[k].index * row_stride + at;
      const Acc weight = sign * taps.first[k].weight;
      Vector<Acc, kLanes> x0, x1, x2, x3;
      load_x<kLanes>(row, x0);
      load_x<kLanes>(row + stride, x1);
      load_x<kLanes>(row + 2 * stride, x2);
      load_x<kLanes>(row + 3 * stride, x3);
      sum0 += weight * x0;
      sum1 += weight * x1;
      sum2 += weight * x2;
      sum3 += weight * x3;
    }
    store(sum0, to);
    store(sum1, to + out_stride);
    store(sum2, to + 2 * out_stride);
    store(sum3, to + 3 * out_stride);
  }

  template <int kLanes>
  void one(int64_t at, int64_t out_at) const {
    Vector<Acc, kLanes> sum = {};
    if (add) {
      load<kLanes, Acc>(out + out_at, sum);
    }
    for (int k = 0; k < taps.count; ++k) {
      Vector<Acc, kLanes> x;
      load_x<kLanes>(taps.first[k].index * row_stride + at, x);
      sum += sign * taps.first[k].weight * x;
    }
    store(sum, out + out_at);
  }

  void scalar(int64_t at, int64_t out_at) const {
    Acc sum = add ? out[out_at] : Acc(0);
    for (int k = 0; k < taps.count; ++k) {
      const int64_t row = taps.first[k].index * row_stride + at;
      Acc x = static_cast<Acc>(rows[row]);
      if constexpr (pair) {
        x -= static_cast<Acc>(minus[row]);
      }
      sum += sign * taps.first[k].weight * x;
    }
    out[out_at] = sum;
  }

  // Numbers [0, n) of the rows.
  template <int kLanes>
  void contiguous(int64_t n) const {
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      four<kLanes>(i, kLanes, i, kLanes);
    }
    for (; i + kLanes <= n; i += kLanes) {
      one<kLanes>(i, i);
    }
    for (; i < n; ++i) {
      scalar(i, i);
    }
  }

  // Numbers [0, n) of `planes` planes.
  template <int kLanes>
  void strided(int64_t n, int64_t planes, int64_t stride, int64_t out_stride) const {
    int64_t p = 0;
    for (; p + 4 <= planes; p += 4) {
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        four<kLanes>(p * stride + i, stride, p * out_stride + i, out_stride);
      }
      for (; i < n; ++i) {
        for (int64_t q = p; q < p + 4; ++q) {
          scalar(q * stride + i, q * out_stride + i);
        }
      }
    }
    for (; p < planes; ++p) {
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        one<kLanes>(p * stride + i, p * out_stride + i);
      }
      for (; i < n; ++i) {
        scalar(p * stride + i, p * out_stride + i);
      }
    }
  }

 private:
  template <int kLanes>
  void load_x(int64_t at, Vector<Acc, kLanes>& x) const {
    load<kLanes, Acc>(rows + at, x);
    if constexpr (pair) {
      Vector<Acc, kLanes> other;
      load<kLanes, Acc>(minus + at, other);
      x -= other;
    }
  }
};

// out[i] = (add ? out[i] : 0) + sum_k weight_k * rows[index_k * row_stride + i], i < n.
template <int kLanes, typename Acc>
inline void weighted_sum(
    const Acc* rows, int64_t row_stride, Taps<Acc> taps, int64_t n, bool add, Acc* out) {
  WeightedSum<Acc, Acc, false>{rows, nullptr, row_stride, taps, Acc(1), add, out}
      .template contiguous<kLanes>(n);
}

// Interleaves the lower (or upper) halves of a and b: a0 b0 a1 b1 ...
template <bool upper, typename V, int... lane>
inline void interleave(const V& a, const V& b, V& out, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  const Vector<Index, lanes> order = {
      (lane / 2 + (upper ? lanes / 2 : 0) + (lane % 2 ? lanes : 0))...};
  out = __builtin_shuffle(a, b, order);
}

// out[j * out_stride + i] = in[i * in_stride + j] of a kLanes x kLanes tile.
template <int kLanes, typename Acc>
inline void transpose_tile(const Acc* in, int64_t in_stride, Acc* out, int64_t out_stride) {
  using V = Vector<Acc, kLanes>;
  constexpr auto kLane = std::make_integer_sequence<int, kLanes>{};
  V rows[kLanes], mixed[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    load<kLanes, Acc>(in + i * in_stride, rows[i]);
  }
  // Each round is a perfect shuffle of the rows; log2(kLanes) of them transpose.
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      interleave<false>(rows[i], rows[i + kLanes / 2], mixed[2 * i], kLane);
      interleave<true>(rows[i], rows[i + kLanes / 2], mixed[2 * i + 1], kLane);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = mixed[i];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    store(rows[i], out + i * out_stride);
  }
}

// out[j * out_stride + i] = in[i * in_stride + j] for i < rows, j < columns.
template <int kLanes, typename Acc>
inline void transpose(
    const Acc* in, int64_t in_stride, int64_t rows, int64_t columns, Acc* out, int64_t out_stride) {
  const int64_t tiled_rows = rows - rows % kLanes, tiled_columns = columns - columns % kLanes;
  for (int64_t i = 0; i < tiled_rows; i += kLanes) {
    for (int64_t j = 0; j < tiled_columns; j += kLanes) {
      transpose_tile<kLanes>(
          in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < tiled_rows ? tiled_columns : 0; j < columns; ++j) {
      out[j * out_stride + i] = in[i * in_stride + j];
    }
  }
}

} // namespace hkd
