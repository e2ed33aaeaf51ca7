// The element types of the operators: codes, and bf16 / fp16 to and from sixteen floats, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "simd.h"

namespace kdfast {

// Must agree with DTYPES in kdfast/ops/native.py.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline void check_dtype(int code) {
  if (code < kFloat32 || code > kFloat16) throw std::invalid_argument("dtype code must be 0 (float32), 1 (bfloat16) or 2 (float16)");
}

inline int64_t size_of(int code) { return code == kFloat32 ? 4 : 2; }

using VecH = uint16_t __attribute__((vector_size(32)));

KDFAST_INLINE VecU widen(const uint16_t* p) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, VecU);
}

KDFAST_INLINE void narrow(uint16_t* p, VecU v) {
  const VecH h = __builtin_convertvector(v, VecH);
  std::memcpy(p, &h, sizeof h);
}

KDFAST_INLINE VecF decode(const float* p) { return load(p); }

KDFAST_INLINE VecF decode(const BFloat16* p) { return reinterpret_cast<VecF>(widen(&p->bits) << 16); }

KDFAST_INLINE VecF decode(const Float16* p) {
  const VecU h = widen(&p->bits);
  const VecU sign = (h & 0x8000u) << 16;
  // The multiplication rebiases the exponent, and normalises subnormal numbers on the way.
  const VecF magnitude = reinterpret_cast<VecF>((h & 0x7fffu) << 13) * 0x1p112f;
  const VecU special = reinterpret_cast<VecU>((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // inf and NaN
  return reinterpret_cast<VecF>(reinterpret_cast<VecU>(magnitude) | special | sign);
}

KDFAST_INLINE void encode(float* p, VecF v) { store(p, v); }

KDFAST_INLINE void encode(BFloat16* p, VecF v) {
  const VecU x = reinterpret_cast<VecU>(v);
  const VecU rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  narrow(&p->bits, (x & 0x7fffffffu) > 0x7f800000u ? (x >> 16) | 0x40u : rounded);
}

KDFAST_INLINE void encode(Float16* p, VecF v) {
  const VecU x = reinterpret_cast<VecU>(v);
  const VecU sign = (x >> 16) & 0x8000u;
  const VecU a = x & 0x7fffffffu;
  // Adding 0.5 leaves the bits of a result below 2^-14 in the low end of the mantissa, rounded by the hardware.
  const VecU tiny = reinterpret_cast<VecU>(reinterpret_cast<VecF>(a) + 0.5f) - 0x3f000000u;
  const VecU normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const VecU special = a > 0x7f800000u ? VecU{} + 0x7e00u : VecU{} + 0x7c00u;
  VecU h = a < 0x38800000u ? tiny : normal;
  h = a >= 0x477ff000u ? special : h;  // 65520 and above round to infinity
  narrow(&p->bits, h | sign);
}

// A full vector from the first `count` < 16 elements; the other lanes hold `fill`.
template <class T>
KDFAST_INLINE VecF decode_part(const T* p, int64_t count, float fill) {
  T tail[kLanes] = {};
  std::memcpy(tail, p, static_cast<size_t>(count) * sizeof(T));
  VecF v = decode(tail);
  for (int64_t i = count; i < kLanes; ++i) v[i] = fill;
  return v;
}

template <class T>
KDFAST_INLINE void encode_part(T* p, VecF v, int64_t count) {
  T tail[kLanes];
  encode(tail, v);
  std::memcpy(p, tail, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace kdfast
