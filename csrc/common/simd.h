// Vectors of sixteen floats whose results have the same bits on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/instructions.h"
#include "common/isa.h"

#define KDFAST_EACH_PART(k) _Pragma("GCC unroll 4") for (int k = 0; k < kLanes / W; ++k)

namespace kdfast {

// Lanes of every vector, on all hardware: the number of lanes fixes the order of every sum.
constexpr int kLanes = 16;
constexpr float kInf = std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Sixteen floats in registers of W each. Compilers also split wider vectors, but compile their comparisons lane by
// lane. Part is a typedef because GCC drops the attribute from an alias whose size depends on a template parameter.
template <int W>
struct Floats {
  typedef float Part __attribute__((vector_size(4 * W)));
  Part part[kLanes / W];
};

// Sixteen 32-bit words; a mask has all ones or all zeros in each word.
template <int W>
struct Words {
  typedef uint32_t Part __attribute__((vector_size(4 * W)));
  Part part[kLanes / W];
};

#define KDFAST_BINARY(Result, Left, op)                                                 \
  template <int W>                                                                      \
  KDFAST_INLINE Result<W> operator op(Left<W> a, Left<W> b) {                           \
    Result<W> r;                                                                        \
    KDFAST_EACH_PART(k) r.part[k] = (typename Result<W>::Part)(a.part[k] op b.part[k]); \
    return r;                                                                           \
  }
KDFAST_BINARY(Floats, Floats, +)
KDFAST_BINARY(Floats, Floats, -)
KDFAST_BINARY(Floats, Floats, *)
KDFAST_BINARY(Words, Floats, <)
KDFAST_BINARY(Words, Floats, ==)
KDFAST_BINARY(Words, Words, +)
KDFAST_BINARY(Words, Words, -)
KDFAST_BINARY(Words, Words, &)
KDFAST_BINARY(Words, Words, |)
KDFAST_BINARY(Words, Words, <)
KDFAST_BINARY(Words, Words, ==)
#undef KDFAST_BINARY

template <int W>
KDFAST_INLINE Words<W> operator<<(Words<W> a, int count) {
  KDFAST_EACH_PART(k) a.part[k] <<= count;
  return a;
}

template <int W>
KDFAST_INLINE Words<W> operator>>(Words<W> a, int count) {
  KDFAST_EACH_PART(k) a.part[k] >>= count;
  return a;
}

template <int W>
KDFAST_INLINE Floats<W> splat(float x) {
  Floats<W> r;
  KDFAST_EACH_PART(k) r.part[k] = typename Floats<W>::Part{} + x;
  return r;
}

template <int W>
KDFAST_INLINE Words<W> words(uint32_t x) {
  Words<W> r;
  KDFAST_EACH_PART(k) r.part[k] = typename Words<W>::Part{} + x;
  return r;
}

template <int W>
KDFAST_INLINE Words<W> bits_of(Floats<W> a) {
  Words<W> r;
  KDFAST_EACH_PART(k) r.part[k] = (typename Words<W>::Part)a.part[k];
  return r;
}

template <int W>
KDFAST_INLINE Floats<W> floats_from(Words<W> a) {
  Floats<W> r;
  KDFAST_EACH_PART(k) r.part[k] = (typename Floats<W>::Part)a.part[k];
  return r;
}

template <template <int> class V, int W>
KDFAST_INLINE V<W> select(Words<W> mask, V<W> a, V<W> b) {
  KDFAST_EACH_PART(k) a.part[k] = mask.part[k] ? a.part[k] : b.part[k];
  return a;
}

// One part at a time: GCC would copy sixteen lanes through memory, in pieces that stall the load that follows.
template <int W>
KDFAST_INLINE Floats<W> load(const float* p) {
  Floats<W> v;
  KDFAST_EACH_PART(k) std::memcpy(&v.part[k], p + k * W, sizeof v.part[k]);
  return v;
}

template <int W>
KDFAST_INLINE void store(float* p, Floats<W> v) {
  KDFAST_EACH_PART(k) std::memcpy(p + k * W, &v.part[k], sizeof v.part[k]);
}

// Non-temporal store, for results that exceed the caches: the memory is not read before it is written. `p` must be
// aligned to a register. Call stream_fence after the last one.
template <int W>
KDFAST_INLINE void stream(float* p, Floats<W> v) {
#ifdef KDFAST_X86
  if constexpr (W >= 8) {
    KDFAST_EACH_PART(k) instructions::stream(p + k * W, v.part[k]);
    return;
  }
#endif
  store(p, v);
}

KDFAST_INLINE void stream_fence() {
#ifdef KDFAST_X86
  __asm__ volatile("sfence" ::: "memory");
#endif
}

// The larger of each pair; b where a is NaN.
template <int W>
KDFAST_INLINE Floats<W> max(Floats<W> a, Floats<W> b) {
  KDFAST_EACH_PART(k) {
#ifdef KDFAST_X86
    if constexpr (W >= 8) {
      instructions::assign_max(a.part[k], b.part[k]);
      continue;
    }
#endif
    a.part[k] = a.part[k] > b.part[k] ? a.part[k] : b.part[k];
  }
  return a;
}

// b where a is not zero, else zero, even if b is infinite or NaN.
template <int W>
KDFAST_INLINE Floats<W> where_nonzero(Floats<W> a, Floats<W> b) {
  KDFAST_EACH_PART(k) b.part[k] = a.part[k] != 0.0f ? b.part[k] : 0.0f;
  return b;
}

// x where a < b, else y.
template <int W>
KDFAST_INLINE Floats<W> where_less(Floats<W> a, Floats<W> b, Floats<W> x, Floats<W> y) {
  KDFAST_EACH_PART(k) x.part[k] = a.part[k] < b.part[k] ? x.part[k] : y.part[k];
  return x;
}

// a b + c, rounded once on every instruction set: by the C library, slowly, where the hardware has no such instruction.
// Explicit, because compilers must not contract (-ffp-contract=off): their choice would differ between sets.
template <int W>
KDFAST_INLINE Floats<W> fma(Floats<W> a, Floats<W> b, Floats<W> c) {
  KDFAST_EACH_PART(k) {
#ifdef KDFAST_X86
    if constexpr (W >= 8) {
      instructions::assign_fma(c.part[k], a.part[k], b.part[k]);
      continue;
    }
#endif
    for (int i = 0; i < W; ++i) c.part[k][i] = __builtin_fmaf(a.part[k][i], b.part[k][i], c.part[k][i]);
  }
  return c;
}

using Floats4 = float __attribute__((vector_size(16)));
using Floats8 = float __attribute__((vector_size(32)));
using Doubles4 = double __attribute__((vector_size(32)));
using Doubles8 = double __attribute__((vector_size(64)));

template <class Half, class Whole>
KDFAST_INLINE Half half_of(const Whole& v, int which) {
  Half h;
  std::memcpy(&h, reinterpret_cast<const char*>(&v) + (which ? sizeof h : 0), sizeof h);
  return h;
}

template <int W>
KDFAST_INLINE float max_of(Floats<W> v) {
  float a[kLanes];
  store(a, v);
  Floats4 q[4];
  std::memcpy(q, a, sizeof a);
  const Floats4 b = q[0] > q[2] ? q[0] : q[2], c = q[1] > q[3] ? q[1] : q[3];
  const Floats4 d = b > c ? b : c;
  const float e = d[0] > d[2] ? d[0] : d[2], f = d[1] > d[3] ? d[1] : d[3];
  return e > f ? e : f;
}

// The same values in double.
template <int W>
KDFAST_INLINE Doubles8 widen(Floats8 v) {
#ifdef KDFAST_X86
  if constexpr (W == 16) {
    Doubles8 wide;
    instructions::widen(wide, v);
    return wide;
  }
#endif
  return __builtin_convertvector(v, Doubles8);
}

// Adds the upper half to the lower half twice, in double: the order of the additions is the same at every width.
template <int W>
KDFAST_INLINE Doubles4 quarter_sums(Floats<W> v) {
  const Doubles8 a = widen<W>(half_of<Floats8>(v, 0)) + widen<W>(half_of<Floats8>(v, 1));
  return half_of<Doubles4>(a, 0) + half_of<Doubles4>(a, 1);
}

template <int W>
KDFAST_INLINE double sum_of(Floats<W> v) {
  const Doubles4 a = quarter_sums(v);
  return (a[0] + a[2]) + (a[1] + a[3]);
}

// A sum that accumulates one block at a time in float lanes and adds blocks in double, so that the error does not grow
// with the length of the row.
template <int W>
struct Sum {
  Floats<W> lanes = splat<W>(0);
  double total = 0;
  KDFAST_INLINE void add(Floats<W> v) { lanes = lanes + v; }
  KDFAST_INLINE void add_product(Floats<W> a, Floats<W> b) { lanes = fma(a, b, lanes); }
  KDFAST_INLINE void flush() {
    total += sum_of(lanes);
    lanes = splat<W>(0);
  }
};

// exp(x) for x <= 0 with an error of at most one unit in the last place; exactly 0 for x <= -88; NaN for NaN.
template <int W>
KDFAST_INLINE Floats<W> exp_nonpositive(Floats<W> x) {
  // Adding 1.5 * 2^23 rounds to an integer n; with 127 more, the low bits of the sum are the exponent field of 2^n.
  const Floats<W> floor = splat<W>(-88.0f), magic = splat<W>(12582912.0f + 127.0f), one = splat<W>(1.0f);
  const Floats<W> c = max(floor, x);
  const Floats<W> shifted = fma(c, splat<W>(1.44269504f), magic);
  const Floats<W> n = shifted - magic;
  const Floats<W> r = fma(n, splat<W>(1.90465430e-9f), fma(n, splat<W>(-6.93147182e-1f), c));  // ln 2 in two parts
  Floats<W> p = splat<W>(1.3814999256e-3f);
  p = fma(p, r, splat<W>(8.3689084277e-3f));
  p = fma(p, r, splat<W>(4.1668396443e-2f));
  p = fma(p, r, splat<W>(1.6666519642e-1f));
  p = fma(p, r, splat<W>(4.9999994040e-1f));
  p = fma(fma(p, r, one), r, one);
  // At x = -88, n is -127 and this power of two is zero.
  return p * floats_from(bits_of(shifted) << 23);
}

// log(x) for normal x > 0 with an error of at most one unit in the last place; finite for smaller x >= 0.
template <int W>
KDFAST_INLINE Floats<W> log_positive(Floats<W> x) {
  constexpr uint32_t kRootHalf = 0x3f3504f3;  // bits of the square root of 1/2
  // x = m 2^n with m in [sqrt 1/2, sqrt 2). The exponent field of `above` is n + 127.
  const Words<W> above = bits_of(x) + words<W>(0x3f800000 - kRootHalf);
  const Floats<W> m = floats_from((above & words<W>(0x007fffff)) + words<W>(kRootHalf));
  const Floats<W> n = floats_from((above >> 23) | words<W>(0x4b000000)) - splat<W>(8388608.0f + 127.0f);
  const Floats<W> r = m - splat<W>(1.0f), square = r * r;
  // log(1 + r) = r - r^2 / 2 + r^3 p
  Floats<W> p = splat<W>(-7.6344973068e-2f);
  p = fma(p, r, splat<W>(1.2761582334e-1f));
  p = fma(p, r, splat<W>(-1.3160184644e-1f));
  p = fma(p, r, splat<W>(1.4201757454e-1f));
  p = fma(p, r, splat<W>(-1.6623357068e-1f));
  p = fma(p, r, splat<W>(2.0001226890e-1f));
  p = fma(p, r, splat<W>(-2.5000821042e-1f));
  p = fma(p, r, splat<W>(3.3333331708e-1f));
  const Floats<W> low = fma(p, square * r, fma(square, splat<W>(-0.5f), n * splat<W>(-1.90465430e-9f)));
  return fma(n, splat<W>(6.93147182e-1f), r + low);  // ln 2 in two parts
}

}  // namespace kdfast
