// Vectors of sixteen doubles: the counterpart of simd.h, with the same order of every sum on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/simd.h"

namespace kdfast {

#define KDFAST_EACH_PART64(k) _Pragma("GCC unroll 8") for (int k = 0; k < 2 * kLanes / W; ++k)

// One register holds W floats, so W / 2 doubles.
template <int W>
struct Doubles {
  typedef double Part __attribute__((vector_size(4 * W)));
  typedef uint64_t Bits __attribute__((vector_size(4 * W)));
  Part part[2 * kLanes / W];
};

#define KDFAST_BINARY64(op)                                          \
  template <int W>                                                   \
  KDFAST_INLINE Doubles<W> operator op(Doubles<W> a, Doubles<W> b) { \
    KDFAST_EACH_PART64(k) a.part[k] = a.part[k] op b.part[k];        \
    return a;                                                        \
  }
KDFAST_BINARY64(+)
KDFAST_BINARY64(-)
KDFAST_BINARY64(*)
KDFAST_BINARY64(/)
#undef KDFAST_BINARY64

template <int W>
KDFAST_INLINE Doubles<W> splat64(double x) {
  Doubles<W> r;
  KDFAST_EACH_PART64(k) r.part[k] = typename Doubles<W>::Part{} + x;
  return r;
}

template <int W>
KDFAST_INLINE Doubles<W> load(const double* p) {
  Doubles<W> v;
  KDFAST_EACH_PART64(k) std::memcpy(&v.part[k], p + k * W / 2, sizeof v.part[k]);
  return v;
}

template <int W>
KDFAST_INLINE void store(double* p, Doubles<W> v) {
  KDFAST_EACH_PART64(k) std::memcpy(p + k * W / 2, &v.part[k], sizeof v.part[k]);
}

// The larger of each pair; b where a is NaN.
template <int W>
KDFAST_INLINE Doubles<W> max(Doubles<W> a, Doubles<W> b) {
  KDFAST_EACH_PART64(k) a.part[k] = a.part[k] > b.part[k] ? a.part[k] : b.part[k];
  return a;
}

// x where a < b, else y.
template <int W>
KDFAST_INLINE Doubles<W> where_less(Doubles<W> a, Doubles<W> b, Doubles<W> x, Doubles<W> y) {
  KDFAST_EACH_PART64(k) x.part[k] = a.part[k] < b.part[k] ? x.part[k] : y.part[k];
  return x;
}

template <int W>
KDFAST_INLINE double max_of(Doubles<W> v) {
  double a[kLanes], m = -std::numeric_limits<double>::infinity();
  store(a, v);
  for (const double x : a) m = x > m ? x : m;
  return m;
}

// Adds the upper half to the lower half, as in simd.h.
template <int W>
KDFAST_INLINE double sum_of(Doubles<W> v) {
  double a[kLanes];
  store(a, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}

// exp(x) for x <= 0 with an error of at most two units in the last place; exactly 0 for x <= -709; NaN for NaN.
template <int W>
KDFAST_INLINE Doubles<W> exp_nonpositive(Doubles<W> x) {
  const Doubles<W> magic = splat64<W>(6755399441055744.0 + 1023.0);  // as for floats in simd.h
  const Doubles<W> c = max(splat64<W>(-709.2), x);
  const Doubles<W> shifted = c * splat64<W>(1.4426950408889634) + magic;
  const Doubles<W> n = shifted - magic;
  // ln 2 in two parts; the first has so few bits that its product with n is exact.
  const Doubles<W> r = (c - n * splat64<W>(6.93147180369123816490e-1)) - n * splat64<W>(1.90821492927058770002e-10);
  constexpr double kInverseFactorials[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                           1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                           1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
  Doubles<W> p = splat64<W>(kInverseFactorials[0]);
  for (int i = 1; i < 12; ++i) p = p * r + splat64<W>(kInverseFactorials[i]);
  p = p * (r * r) + r + splat64<W>(1.0);
  // At x = -709.2, n is -1023 and this power of two is zero.
  KDFAST_EACH_PART64(k) {
    typename Doubles<W>::Bits bits;
    std::memcpy(&bits, &shifted.part[k], sizeof bits);
    bits <<= 52;
    typename Doubles<W>::Part power;
    std::memcpy(&power, &bits, sizeof power);
    p.part[k] = p.part[k] * power;
  }
  return p;
}

// log(x) for normal x > 0 with an error of at most two units in the last place; NaN for NaN.
template <int W>
KDFAST_INLINE Doubles<W> log_positive(Doubles<W> x) {
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd;  // bits of the square root of 1/2
  Doubles<W> mantissa, exponent;                      // x = mantissa 2^exponent, mantissa in [sqrt 1/2, sqrt 2)
  KDFAST_EACH_PART64(k) {
    typename Doubles<W>::Bits bits, above;
    std::memcpy(&bits, &x.part[k], sizeof bits);
    // The exponent plus 1024 in the low bits of the double 2^52, whose value is then 2^52 + exponent + 1024.
    above = bits - kRootHalf + (uint64_t{1024} << 52);
    bits -= (above & (uint64_t{0xfff} << 52)) - (uint64_t{1024} << 52);
    above = (above >> 52) | (uint64_t{0x433} << 52);
    std::memcpy(&mantissa.part[k], &bits, sizeof bits);
    std::memcpy(&exponent.part[k], &above, sizeof above);
  }
  exponent = exponent - splat64<W>(4503599627370496.0 + 1024);
  // log m = 2 artanh s, by its power series.
  const Doubles<W> one = splat64<W>(1.0), s = (mantissa - one) / (mantissa + one), square = s * s;
  Doubles<W> p = splat64<W>(1.0 / 23);
  for (int odd = 21; odd >= 3; odd -= 2) p = p * square + splat64<W>(1.0 / odd);
  const Doubles<W> twice = s + s;
  const Doubles<W> low = twice * (square * p) + exponent * splat64<W>(1.90821492927058770002e-10);
  Doubles<W> result = exponent * splat64<W>(6.93147180369123816490e-1) + (twice + low);
  KDFAST_EACH_PART64(k) result.part[k] = x.part[k] == x.part[k] ? result.part[k] : x.part[k];
  return result;
}

}  // namespace kdfast
