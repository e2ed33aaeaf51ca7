// Sixteen-lane float vectors that give the same bits on every instruction set, and the macro that compiles a kernel for each.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#define KDFAST_INLINE inline __attribute__((always_inline))

// KDFAST_FOR_EACH_ISA(NAME) expands to NAME(suffix, attribute) once per instruction set: a kernel is an always-inlined body plus
// one thin function per set, picked at run time by level(). Unlike target_clones this needs no ifunc and a test can name a level.
#if defined(__x86_64__) && defined(__GNUC__)
#define KDFAST_FOR_EACH_ISA(NAME)                           \
  NAME(base, )                                              \
  NAME(v3, __attribute__((target("arch=x86-64-v3"))))       \
  NAME(v4, __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))))
#define KDFAST_PICK_ISA(level, kernel) ((level) >= 2 ? kernel##_v4 : (level) == 1 ? kernel##_v3 : kernel##_base)
#else
#define KDFAST_FOR_EACH_ISA(NAME) NAME(base, )
#define KDFAST_PICK_ISA(level, kernel) (static_cast<void>(level), kernel##_base)
#endif

namespace kdfast {

constexpr int kWidestIsa = 2;

// 0: baseline, 1: x86-64-v3, 2: x86-64-v4; no higher than `limit`.
inline int isa_level(int limit = kWidestIsa) {
  int level = 0;
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
    level = 2;
#endif
  return level < limit ? level : limit;
}

// One width for all sets: the lanes, not the hardware, fix the order of every sum.
constexpr int64_t kLanes = 16;
using VecF = float __attribute__((vector_size(64)));
using VecI = int32_t __attribute__((vector_size(64)));
using VecU = uint32_t __attribute__((vector_size(64)));

constexpr float kInf = std::numeric_limits<float>::infinity();

KDFAST_INLINE VecF splat(float x) { return VecF{} + x; }

KDFAST_INLINE VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

KDFAST_INLINE void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }

KDFAST_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }

KDFAST_INLINE float max_of(VecF v) {
  float a[kLanes];
  store(a, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
}

KDFAST_INLINE double sum_of(VecF v) {
  double a[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) a[i] = static_cast<double>(v[i]) + static_cast<double>(v[i + kLanes / 2]);
  for (int half = kLanes / 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}

// A sum that keeps float lanes for one block at a time and adds blocks in double: the error does not grow with the row.
struct Sum {
  VecF lanes = VecF{};
  double total = 0;
  KDFAST_INLINE void add(VecF v) { lanes += v; }
  KDFAST_INLINE void flush() {
    total += sum_of(lanes);
    lanes = VecF{};
  }
};

// exp(x) for x <= 0, about one unit in the last place; exactly 0 below the smallest normal number and at -inf; NaN stays NaN.
KDFAST_INLINE VecF exp_nonpositive(VecF x) {
  const VecF floor = splat(-87.336544f);
  const VecF c = x < floor ? floor : x;
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF shifted = c * 1.44269504f + magic;
  const VecF n = shifted - magic;
  // ln 2 in two parts; the first has few bits, so that n times it is exact.
  const VecF r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
  VecF p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecI power = (reinterpret_cast<VecI>(shifted) - 0x4b400000 + 127) << 23;
  const VecF y = p * reinterpret_cast<VecF>(power);
  return x < floor ? VecF{} : y;
}

}  // namespace kdfast
