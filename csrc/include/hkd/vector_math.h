// Exponentials and logarithms of a float, or of a vector of floats, without branch, table or call.
//
// V is float or a vector type of the compiler's (`Vector`), whose comparisons and conditional
// operator work lane by lane; a double takes the standard library's functions. The float forms err
// by at most about 2 units in the last place (vector_pow: 4) and flush what is below the smallest
// normal number to 0. NaN passes through. The polynomials are minimax fits of ours; the reductions
// are the textbook ones (Muller, Elementary Functions, chapters 5 and 6). Needs no torch header.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hkd/macros.h"

namespace hkd {

#if defined(__GNUC__) && !defined(__CUDACC__)
template <typename Acc, int kLanes>
struct VectorOf {
  typedef float type __attribute__((vector_size(sizeof(float) * kLanes)));
};
template <int kLanes>
struct VectorOf<double, kLanes> {
  using type = double;
};
#else
template <typename Acc, int kLanes>
struct VectorOf {
  using type = Acc;
};
#endif
// kLanes floats, or one double.
template <typename Acc, int kLanes>
using Vector = typename VectorOf<Acc, kLanes>::type;

template <typename To, typename From>
HKD_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Unsigned integers of the width of V's floats: the bits of a NaN may overflow.
template <typename V>
struct BitsOf {
  typedef uint32_t type __attribute__((vector_size(sizeof(V))));
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <typename V>
using Bits = typename BitsOf<V>::type;

// 2^power for the nearest integer to `power`, in [-127, 128]; 2^-127 reads 0 and 2^128 infinity.
template <typename V>
struct PowerOfTwo {
  V whole, value;

  HKD_HD explicit PowerOfTwo(V power) {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
    const V shifted = power + 12582912.0f;
    whole = shifted - 12582912.0f;
    value = bits_as<V>((bits_as<Bits<V>>(shifted) << 23) + 0x3f800000);
  }
};

// e^r - 1 for |r| <= ln(2) / 2.
template <typename V>
HKD_HD V expm1_near_zero(V r) {
  const V r2 = r * r;
  const V low = 0.49999998f + 0.166665387f * r, high = 0.0416672213f + 0.00836718085f * r;
  return r + r2 * (low + r2 * (high + r2 * 0.00138823959f));
}

// e^x = two.value (1 + rest) for x <= 0.
template <typename V>
struct ExpParts {
  PowerOfTwo<V> two;
  V rest;

  HKD_HD explicit ExpParts(V x) : ExpParts(x < -88.0f ? V{} - 88.0f : x, 0) {
  }

 private:
  HKD_HD ExpParts(V x, int)
      : two(x * 1.44269504f),
        // ln(2) in two parts, of which the first times a small integer is exact.
        rest(expm1_near_zero<V>((x - two.whole * 0.693145752f) - two.whole * 1.42860677e-6f)) {
  }
};

// e^x for x <= 0.
template <typename V>
HKD_HD V vector_exp(V x) {
  const ExpParts<V> parts(x);
  return parts.two.value * parts.rest + parts.two.value;
}

// e^x - 1 for x <= 0.
template <typename V>
HKD_HD V vector_expm1(V x) {
  const ExpParts<V> parts(x);
  return parts.two.value * parts.rest + (parts.two.value - 1);
}

// ln(2^exponent (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2)].
template <typename V>
HKD_HD V log_of_parts(V exponent, V f) {
  const V f2 = f * f, f4 = f2 * f2;
  const V low = (0.333333317f - 0.250008268f * f) + f2 * (0.200012359f - 0.166231445f * f);
  const V high = (0.142013685f - 0.131620038f * f) + f2 * (0.127654286f - 0.0763438962f * f);
  const V small = f * f2 * (low + f4 * high) + exponent * 1.42860677e-6f;
  return exponent * 0.693145752f + (f - (f2 * 0.5f - small));
}

// x = 2^exponent (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)], for normal numbers above 0; finite, if
// meaningless, for what is 0, subnormal or negative.
template <typename V>
struct LogParts {
  V exponent, f;

  HKD_HD explicit LogParts(V x) {
    const Bits<V> bits = bits_as<Bits<V>>(x);
    const Bits<V> biased = (bits + (0x3f800000 - 0x3f3504f3)) >> 23; // of x / sqrt(1/2)
    // As the lowest bits of 2^23 an integer is a float.
    exponent = bits_as<V>(biased | 0x4b000000) - (8388608.0f + 127);
    f = bits_as<V>(bits - (biased << 23) + 0x3f800000) - 1;
  }
};

// x ln x for x >= 0, where 0 ln 0 is 0; NaN below.
template <typename V>
HKD_HD V x_log_x(V x) {
  const LogParts<V> parts(x);
  return x >= 0 ? x * log_of_parts<V>(parts.exponent, parts.f) : V{} + NAN;
}

// ln(1 + x) for 0 <= x <= 1.
template <typename V>
HKD_HD V log1p_of_fraction(V x) {
  const V x2 = x * x, x4 = x2 * x2;
  const V low = (0.499999328f - 0.333305113f * x) + x2 * (0.249585875f - 0.196954009f * x);
  const V high = (0.153553972f - 0.10680557f * x) + x2 * (0.057664459f - 0.0202045928f * x);
  const V p = low + x4 * (high + x4 * 0.00331847427f);
  return x - x2 * p;
}

template <>
HKD_HD double vector_exp(double x) {
  return std::exp(x);
}
template <>
HKD_HD double vector_expm1(double x) {
  return std::expm1(x);
}
template <>
HKD_HD double x_log_x(double x) {
  return x == 0 ? 0 : x * std::log(x);
}
template <>
HKD_HD double log1p_of_fraction(double x) {
  return std::log1p(x);
}

// An exponent prepared for vector_pow.
template <typename Acc>
struct Exponent {
  Acc value, high, low, at_zero;

  HKD_HD explicit Exponent(double exponent)
      : value(static_cast<Acc>(exponent)),
        // 12 bits, so that the product with the exponent of a float is exact.
        high(bits_as<float>(bits_as<uint32_t>(static_cast<float>(exponent)) & 0xfffff000u)),
        low(static_cast<Acc>(exponent - high)),
        at_zero(
            exponent == 0  ? Acc(1)
            : exponent > 0 ? Acc(0)
                           : Acc(INFINITY)) {
  }
};

// x^exponent for x >= 0, where it does not overflow; NaN below 0.
template <typename V>
HKD_HD V vector_pow(V x, const Exponent<float>& exponent) {
  const LogParts<V> parts(x);
  const V log2 = log_of_parts<V>(V{}, parts.f) * 1.44269504f;
  // The whole part of the product has to come off before anything is rounded.
  const V high = exponent.high * parts.exponent;
  const V low = exponent.low * parts.exponent + exponent.value * log2;
  const V power = high + low;
  const PowerOfTwo<V> two(power);
  const V rest = ((high - two.whole) + low) * 0.693147181f;
  V result = two.value * expm1_near_zero(rest) + two.value;
  result = power < -126.5f ? V{} : result;
  result = x == 0 ? V{} + exponent.at_zero : result;
  return x >= 0 ? result : V{} + NAN;
}

HKD_HD double vector_pow(double x, const Exponent<double>& exponent) {
  return std::pow(x, exponent.value);
}

// ln of a sum in double that has to serve a float: relative error 1e-13. Plain arithmetic on bits,
// which vectorises without a conversion between integers and doubles (AVX2 has none).
HKD_HD double log_of_sum(double x, float) {
  const uint64_t bits = bits_as<uint64_t>(x);
  const uint64_t biased = (bits + 0x3ff0000000000000ull - 0x3fe6a09e667f3bcdull) >> 52;
  const double exponent = bits_as<double>(biased | 0x4330000000000000ull) - (0x1p52 + 1023);
  const double m = bits_as<double>(bits - (biased << 52) + 0x3ff0000000000000ull);
  const double s = (m - 1) / (m + 1), z = s * s;
  double r = z * 0.19587000506333047 + 0.2217600384654243;
  r = r * z + 0.28572113246609682;
  r = r * z + 0.39999995586692799;
  r = r * z + 0.66666666675893238;
  const double log = exponent * 0.6931471805599453 + (s * z * r + 2 * s);
  const double special = x > 0 ? x : x == 0 ? -static_cast<double>(INFINITY) : NAN;
  return x > 0 && x < static_cast<double>(INFINITY) ? log : special;
}
HKD_HD double log_of_sum(double x, double) {
  return std::log(x);
}

// sigmoid(z), sigmoid(-z) and their logarithms, finite for every finite z.
template <typename V>
struct Bernoulli {
  V p, not_p, log_p, log_not_p;

  HKD_HD explicit Bernoulli(V z) {
    const V small = vector_exp<V>(z < 0 ? z : -z);
    const V larger = 1 / (1 + small), smaller = small * larger;
    p = z < 0 ? smaller : larger;
    not_p = z < 0 ? larger : smaller;
    const V rest = log1p_of_fraction<V>(small);
    log_p = (z < 0 ? z : V{}) - rest;
    log_not_p = (z < 0 ? V{} : -z) - rest;
  }
};

} // namespace hkd
