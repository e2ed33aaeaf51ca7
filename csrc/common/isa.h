// The instruction sets that kernels are compiled for, and the selection of one at run time.
#pragma once

#define KDFAST_INLINE inline __attribute__((always_inline))

// Kernels for several instruction sets.
#if defined(__x86_64__) && defined(__GNUC__)
#define KDFAST_X86
// Attributes of functions that are compiled for one set. Registers of 512 bits are used on request only.
#ifdef __clang__
#define KDFAST_TARGET_V3 __attribute__((target("arch=x86-64-v3,prfchw")))
#define KDFAST_TARGET_V4 __attribute__((target("arch=x86-64-v4,prfchw"), __min_vector_width__(512)))
#else
#define KDFAST_TARGET_V3 __attribute__((target("arch=x86-64-v3,prfchw")))
#define KDFAST_TARGET_V4 __attribute__((target("arch=x86-64-v4,prfchw,prefer-vector-width=512")))
#endif
#endif

namespace kdfast {

constexpr int kWidestIsa = 2;

// One instruction set: Isa::run<Body>(args...) is Body::run<W>(args...) compiled for it, W being the floats that one of
// its registers holds. Body::run must be always inlined. Unlike target_clones, this needs no ifunc, the body knows the
// width, and a test can select a set.
#define KDFAST_ISA(Name, width, attribute)             \
  struct Name {                                        \
    template <class Body, class Result, class... Args> \
    attribute static Result run(Args... args) {        \
      return Body::template run<width>(args...);       \
    }                                                  \
  };
KDFAST_ISA(Baseline, 4, )
#ifdef KDFAST_X86
KDFAST_ISA(X86V3, 8, KDFAST_TARGET_V3)
KDFAST_ISA(X86V4, 16, KDFAST_TARGET_V4)
// Initializer of an array that isa_level indexes: make<Isa>() of each instruction set.
#define KDFAST_FOR_EACH_ISA(make) {make<Baseline>(), make<X86V3>(), make<X86V4>()}
#else
#define KDFAST_FOR_EACH_ISA(make) {make<Baseline>()}
#endif
#undef KDFAST_ISA

// 0: baseline, 1: x86-64-v3, 2: x86-64-v4; at most `limit`, but at least 0.
inline int isa_level(int limit = kWidestIsa) {
  int level = 0;
#ifdef KDFAST_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
    level = 2;
#endif
  return level < limit ? level : limit < 0 ? 0 : limit;
}

}  // namespace kdfast
