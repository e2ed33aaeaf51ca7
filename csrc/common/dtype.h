// The operators' element types: their codes, and conversions between fp32, bf16 or fp16 and sixteen floats. Rounding is
// to nearest even.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "common/instructions.h"
#include "common/simd.h"

namespace kdfast {

// Must match DTYPE_CODES in kdfast/ops/native.py.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline void check_dtype(int code) {
  if (code < kFloat32 || code > kFloat16)
    throw std::invalid_argument("dtype code must be 0 (float32), 1 (bfloat16) or 2 (float16)");
}

inline int64_t size_of(int code) { return code == kFloat32 ? 4 : 2; }

// Sixteen 16-bit words.
template <int W>
struct Halves {
  typedef uint16_t Part __attribute__((vector_size(2 * W)));
  Part part[kLanes / W];
};

template <int W>
KDFAST_INLINE Words<W> widen(const uint16_t* p) {
  Halves<W> h;
  KDFAST_EACH_PART(k) std::memcpy(&h.part[k], p + k * W, sizeof h.part[k]);
  Words<W> r;
  KDFAST_EACH_PART(k) r.part[k] = __builtin_convertvector(h.part[k], typename Words<W>::Part);
  return r;
}

template <int W>
KDFAST_INLINE void narrow(uint16_t* p, Words<W> v) {
  Halves<W> h;
  KDFAST_EACH_PART(k) h.part[k] = __builtin_convertvector(v.part[k], typename Halves<W>::Part);
  KDFAST_EACH_PART(k) std::memcpy(p + k * W, &h.part[k], sizeof h.part[k]);
}

template <int W>
KDFAST_INLINE Floats<W> decode(const float* p) {
  return load<W>(p);
}

template <int W>
KDFAST_INLINE Floats<W> decode(const BFloat16* p) {
  return floats_from(widen<W>(&p->bits) << 16);
}

template <int W>
KDFAST_INLINE Floats<W> decode(const Float16* p) {
#ifdef KDFAST_X86
  if constexpr (W >= 8) {
    Floats<W> r;
    KDFAST_EACH_PART(k) {
      typename Halves<W>::Part h;
      std::memcpy(&h, &p[k * W].bits, sizeof h);
      instructions::decode_half(r.part[k], h);
    }
    return r;
  }
#endif
  const Words<W> h = widen<W>(&p->bits);
  const Words<W> sign = (h & words<W>(0x8000u)) << 16;
  // The multiplication rebiases the exponent and normalizes subnormal numbers.
  const Floats<W> magnitude = floats_from((h & words<W>(0x7fffu)) << 13) * splat<W>(0x1p112f);
  const Words<W> not_finite = (h & words<W>(0x7c00u)) == words<W>(0x7c00u);
  return floats_from(bits_of(magnitude) | (not_finite & words<W>(0x7f800000u)) | sign);
}

template <int W>
KDFAST_INLINE void encode(float* p, Floats<W> v) {
  store(p, v);
}

template <int W>
KDFAST_INLINE void encode(BFloat16* p, Floats<W> v) {
  const Words<W> x = bits_of(v), high = x >> 16;
  const Words<W> rounded = (x + words<W>(0x7fffu) + (high & words<W>(1u))) >> 16;
  narrow(&p->bits, select(v == v, rounded, high | words<W>(0x40u)));
}

template <int W>
KDFAST_INLINE void encode(Float16* p, Floats<W> v) {
  const Words<W> x = bits_of(v), a = x & words<W>(0x7fffffffu);
  const Words<W> sign = (x >> 16) & words<W>(0x8000u);
  // For results below 2^-14: adding 0.5 moves their bits to the low end of the mantissa, rounded by the hardware.
  const Words<W> tiny = bits_of(floats_from(a) + splat<W>(0.5f)) - words<W>(0x3f000000u);
  const Words<W> normal = (a - words<W>(0x38000000u) + words<W>(0xfffu) + ((a >> 13) & words<W>(1u))) >> 13;
  const Words<W> special = select(v == v, words<W>(0x7c00u), words<W>(0x7e00u));
  const Words<W> h = select(a < words<W>(0x38800000u), tiny, normal);
  narrow(&p->bits, select(a < words<W>(0x477ff000u), h, special) | sign);  // 65520 and larger round to infinity
}

// Loads the first `count` < 16 elements; the other lanes are `fill`.
template <int W, class T>
KDFAST_INLINE Floats<W> decode_part(const T* p, int64_t count, float fill) {
  T part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  float values[kLanes];
  store(values, decode<W>(part));
  for (int64_t i = count; i < kLanes; ++i) values[i] = fill;
  return load<W>(values);
}

template <class T, int W>
KDFAST_INLINE void encode_part(T* p, Floats<W> v, int64_t count) {
  T part[kLanes];
  encode(part, v);
  std::memcpy(p, part, static_cast<size_t>(count) * sizeof(T));
}

// Converts one element with the arithmetic of a vector.
template <class T>
inline float decode_one(const T* p) {
  float values[kLanes];
  store(values, decode_part<4>(p, 1, 0.0f));
  return values[0];
}

template <class T>
inline void encode_one(T* p, float value) {
  encode_part(p, splat<4>(value), 1);
}

}  // namespace kdfast
