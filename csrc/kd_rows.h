// Vector loops over one row of logits, as a table of functions per instruction set.
#pragma once

#include <cstdint>

namespace kdfast {

// How exp(z) follows from e = exp(z / T): it is e (or not wanted), e squared once or twice, or an exponential of its own.
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

// Outer indices: reverse divergence or not, Power, dtype code. Buffers hold full vectors of 16 floats, so up to 15 more than n.
struct RowKernels {
  // Largest of n elements; writes them as floats to `out` unless it is null.
  float (*load[3])(const void* p, int64_t stride, int64_t n, float* out);
  // Keep the terms in e, u, e1 unless e is null (u is b - a for the reverse divergence); e and u may be the rows themselves.
  Sums (*student[4])(const float* z, int64_t n, float max_z, float inv_t, float* e, float* e1);
  Sums (*pair[2][4])(const float* z, const float* t, int64_t n, float max_z, float max_t, float inv_t, float* e, float* u, float* e1);
  // Writes one row from the kept terms; u may be null.
  void (*gradient[2][4][3])(const float* e, const float* u, const float* e1, int64_t n, Slopes s, void* out);
  void (*scale[3])(const void* grad, void* out, int64_t n, float factor);
  double (*sum)(const float* p, int64_t n);
};

// The table for the widest instruction set of this machine that is not above the limit.
const RowKernels& row_kernels(int isa_limit);

}  // namespace kdfast
