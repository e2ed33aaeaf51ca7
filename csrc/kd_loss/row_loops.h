// Vector loops over one row of logits, as a table of functions for each instruction set.
//
// The terms of a row, for the student's logits z and the teacher's logits t:
//   e1 = exp(z - max z)         of the student's softmax at temperature 1
//   e  = exp((z - max z) / T)   of the student's softmax at temperature T
//   u  = exp((t - max t) / T)   of the teacher's softmax at temperature T
// The divergences also need the gap between the exponents b = (z - max z) / T and a = (t - origin) / T, where `origin`
// is max t for the forward divergence. The reverse divergence keeps b - a in place of u.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace kdfast {

// How e1 follows from e: it equals e (or is not needed), is e squared once or twice, or needs its own exp.
enum Power : int { kPowerOne = 0, kPowerTwo = 1, kPowerFour = 2, kPowerAny = 3 };

struct Sums {
  double e1 = 0, e = 0, u = 0;
  double cross = 0;  // forward: sum of u (a - b); reverse: sum of e (b - a)
};

// Coefficients of the gradient: e1 * slope.e1 + e * slope.e - u * slope.u for the forward divergence, and
// e1 * slope.e1 + e * slope.e * (b - a - shift) for the reverse divergence.
struct Slopes {
  float e1 = 0, e = 0, u = 0, shift = 0;
};

// Number of classes that are not masked, and the sum of their logits relative to the largest one.
struct Total {
  double count, sum;
};

// The terms of one thread's row; each pointer has room for the row rounded up to 16 floats.
struct Scratch {
  float *e, *u, *e1;
};

// Memory to prefetch while the sums of a row are computed: the sums are compute-bound, the loops before and after them
// memory-bound. Sizes are the bytes per class, 0 if there is nothing to prefetch.
struct Prefetch {
  const char *z, *t;  // the logits that are loaded next
  const char* grad;   // the gradient that is written next
  int64_t z_size, t_size, grad_size;
};

// Whether a row of the gradient is written with non-temporal stores, since it would evict the operands from the caches.
constexpr bool is_streamed(int dtype, int64_t n) { return dtype == kFloat32 && n >= 16384; }

// Outer indices: reverse divergence or not, Power, dtype code.
struct RowKernels {
  // Returns the largest of n elements. Writes the elements as floats to `out` and pads the last vector with -inf;
  // unless `copy` is set, writes only that vector.
  float (*load[3])(const void* p, int64_t stride, int64_t n, float* out, bool copy);
  // Sums over rows whose last vectors `load` has padded in s.e (student) and s.u (teacher); z and t may be those arrays
  // or the operands themselves. With `keep`, the terms e, u and, for kPowerAny, e1 are stored in the scratch.
  Sums (*student_sums[4])(const float* z, int64_t n, float max_z, float inv_t, bool keep, Scratch s,
                          const Prefetch& prefetch);
  // `origin` as defined above; the forward divergence ignores it.
  Sums (*pair_sums[2][4])(const float* z, const float* t, int64_t n, float max_z, float max_t, float origin,
                          float inv_t, bool keep, Scratch s, const Prefetch& prefetch);
  // Writes n classes of the gradient from the kept terms; with `stream`, floats bypass the caches.
  void (*gradient[2][4][3])(Scratch s, bool has_teacher, int64_t n, Slopes slopes, bool stream, void* out);
  // The same with a number subtracted from each class, for a smoothed label.
  void (*smoothed_gradient[2][4][3])(Scratch s, bool has_teacher, int64_t n, Slopes slopes, bool stream, void* out,
                                     float subtracted);
  void (*scale[3])(const void* grad, void* out, int64_t n, float factor);
  // The last vector of x, if partial, is padded in `end`.
  Total (*total)(const float* x, const float* end, int64_t n, float max);
  // Sum of p[0, n); p is padded with zeros to a full vector.
  double (*sum)(const float* p, int64_t n);
  // Replaces sixteen positive numbers by their logarithms.
  void (*logarithms)(double* x);
};

// The table of the widest instruction set that this machine has and that does not exceed the limit.
const RowKernels& row_kernels(int isa_limit);

}  // namespace kdfast
