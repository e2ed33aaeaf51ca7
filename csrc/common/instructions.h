// Instructions that compilers do not choose by themselves, for vectors of type Part in one register of x86-64-v3 or
// x86-64-v4. They are used by functions that are compiled for every instruction set, in which GCC accepts inline
// assembly but no intrinsics.
//
// Clang accepts neither there, but chooses most of the instructions by itself. The others are functions of their own
// target, which it inlines. They take references, since passing a wide vector needs that target in the caller as well.
#pragma once

#include <cstdint>

#include "common/isa.h"

#ifdef KDFAST_X86

#ifdef __clang__
#include <immintrin.h>
#endif

namespace kdfast::instructions {

#ifdef __clang__

using Eight = float __attribute__((vector_size(32)));
using Sixteen = float __attribute__((vector_size(64)));
using HalfEight = uint16_t __attribute__((vector_size(16)));
using HalfSixteen = uint16_t __attribute__((vector_size(32)));

template <class Part>
KDFAST_INLINE void stream(float* p, const Part& v) {
  __builtin_nontemporal_store(v, reinterpret_cast<Part*>(p));
}

template <class Part>
KDFAST_INLINE void assign_max(Part& a, const Part& b) {
  a = a > b ? a : b;
}

KDFAST_TARGET_V3 inline void assign_fma(Eight& c, const Eight& a, const Eight& b) { c = _mm256_fmadd_ps(a, b, c); }
KDFAST_TARGET_V4 inline void assign_fma(Sixteen& c, const Sixteen& a, const Sixteen& b) {
  c = _mm512_fmadd_ps(a, b, c);
}

KDFAST_TARGET_V3 inline void decode_half(Eight& r, const HalfEight& h) { r = _mm256_cvtph_ps((__m128i)h); }
KDFAST_TARGET_V4 inline void decode_half(Sixteen& r, const HalfSixteen& h) { r = _mm512_cvtph_ps((__m256i)h); }

template <class Double, class Float>
KDFAST_INLINE void widen(Double& wide, const Float& v) {
  wide = __builtin_convertvector(v, Double);
}

#else

// *p = v past the caches.
template <class Part>
KDFAST_INLINE void stream(float* p, const Part& v) {
  __asm__ volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<Part*>(p)) : "v"(v));
}

// a = a > b ? a : b. GCC emits a comparison and a blend.
template <class Part>
KDFAST_INLINE void assign_max(Part& a, const Part& b) {
  __asm__("vmaxps %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
}

// c += a b, rounded once.
template <class Part>
KDFAST_INLINE void assign_fma(Part& c, const Part& a, const Part& b) {
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
}

// The floats of halves.
template <class Part, class Half>
KDFAST_INLINE void decode_half(Part& r, const Half& h) {
  __asm__("vcvtph2ps %1, %0" : "=v"(r) : "v"(h));
}

// The doubles of eight floats, x86-64-v4 only. GCC converts two halves and joins them.
template <class Double, class Float>
KDFAST_INLINE void widen(Double& wide, const Float& v) {
  __asm__("vcvtps2pd %1, %0" : "=v"(wide) : "v"(v));
}

#endif

}  // namespace kdfast::instructions

#endif
