// Vector loops over one row of logits, as a table of functions per instruction set.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace kdfast {

// How exp(z) follows from e = exp(z / T): it is e (or not wanted), e squared once or twice, or an exponential of its
// own.
enum Power : int { kPowerOne = 0, kPowerTwo = 1, kPowerFour = 2, kPowerAny = 3 };

struct Sums {
  double one = 0;      // sum of exp(z - max z)
  double student = 0;  // sum of exp((z - max z) / T)
  double teacher = 0;  // sum of exp((t - max t) / T)
  double cross = 0;    // sum of u (a - b), or e (b - a) for the reverse divergence; a, b: the two exponents
};

struct Slopes {
  float one = 0, student = 0, teacher = 0;  // factors of e1, e and u
  float shift = 0;                          // what the reverse divergence subtracts from b - a
};

// Vectors of one thread, each with room for a row rounded up to 16 floats.
struct Scratch {
  float *e, *u, *e1;
};

// Memory that is fetched while a row's sums are computed: they wait for arithmetic, the passes around them for memory.
// Sizes in bytes a class; 0 where nothing is to be fetched.
struct Ahead {
  const char *z, *t;  // the rows to be loaded next
  const char* grad;   // where this row's gradient will be written
  int64_t z_size, t_size, grad_size;
};

// Whether a row of the gradient goes around the caches: it would drive out of them what is read.
constexpr bool is_streamed(int dtype, int64_t n) { return dtype == kFloat32 && n >= 16384; }

// Outer indices: reverse divergence or not, Power, dtype code.
struct RowKernels {
  // Largest of n elements. Writes them as floats to `out`, the last vector padded with -inf; without `copy`, that
  // vector only.
  float (*load[3])(const void* p, int64_t stride, int64_t n, float* out, bool copy);
  // Sums over rows that `load` went through with `out` = s.e (the student's) and s.u (the teacher's); z and t may be
  // those, or the rows themselves. Kept terms replace them: e, u (b - a for the reverse divergence) and, for kPowerAny,
  // e1.
  Sums (*student[4])(const float* z, int64_t n, float max_z, float inv_t, bool keep, Scratch s, const Ahead& ahead);
  // `from_t`: where the teacher's exponents in `cross` and b - a count from, for the reverse divergence.
  Sums (*pair[2][4])(const float* z, const float* t, int64_t n, float max_z, float max_t, float from_t, float inv_t,
                     bool keep, Scratch s, const Ahead& ahead);
  // Writes n classes of the gradient from the kept terms; floats go around the caches with `stream`.
  void (*gradient[2][4][3])(Scratch s, bool has_teacher, int64_t n, Slopes slopes, bool stream, void* out);
  void (*scale[3])(const void* grad, void* out, int64_t n, float factor);
  // Sum of p[0, n), padded with zeros to a full vector.
  double (*sum)(const float* p, int64_t n);
  // Replaces sixteen positive numbers by their logarithms.
  void (*logarithms)(double* x);
};

// The table for the widest instruction set of this machine that is not above the limit.
const RowKernels& row_kernels(int isa_limit);

}  // namespace kdfast
