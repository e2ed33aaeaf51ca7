// Vector loops over one row of logits for the divergences other than KL, in addition to those of row_loops.h.
#pragma once

#include <cstdint>

#include "kd_loss/row_loops.h"

namespace kdfast {

// Inputs of the mixture of the Jensen-Shannon divergence. The mixture is relative to the largest term of the teacher:
// m = beta u + student e, where student = (1 - beta) S(u) / S(e).
struct Mixture {
  float max_z, max_t, inv_t;
  float beta, student;
  float log_ratio;  // log(S(u) / S(e))
};

// Sums over the classes of u log(q / m) and e log(p / m), of teacher and student.
struct MixtureSums {
  double teacher, student;
};

// A row of logits standardized up to a shift, which the softmax ignores: (x - max) scale, scale = 1 / (T deviation).
struct Standardization {
  float max, scale, mean;  // mean of x - max
};

struct StandardizedSums {
  double e1, e, u;
  double cross;             // of u (a - b)
  double student, teacher;  // of e b and u b
};

// Terms of a row of standardized logits; `centered` is z - mean z, 0 for a masked class.
struct StandardizedScratch {
  float *e, *u, *e1, *centered;
};

// Coefficients of the gradient: e1 * slope.e1 + e * slope.e - u * slope.u + centered * slope.centered.
struct StandardizedSlopes {
  float e1 = 0, e = 0, u = 0, centered = 0;
};

// The cross-entropy in a gradient of standardized logits.
enum Labels : int { kNoLabels = 0, kOneHot = 1, kSmoothed = 2 };

struct DivergenceKernels {
  // z and t as for pair_sums, except that `z_end` and `t_end` hold the padded last vectors. Replaces u by log(p / m).
  MixtureSums (*mixture)(const float* z, const float* t, const float* z_end, const float* t_end, int64_t n, Mixture m,
                         Scratch s);
  // Sum of the squared distances from the mean.
  double (*squares)(const float* x, const float* end, int64_t n, float max, float mean);
  // Index: whether e1 is needed. The padded last vectors are in s.e and s.u.
  StandardizedSums (*standardized_sums[2])(const float* z, const float* t, int64_t n, Standardization student,
                                           Standardization teacher, StandardizedScratch s, const Prefetch& prefetch);
  // Outer index: Labels; inner: dtype code. For smoothed labels, `subtracted` is subtracted from each class.
  void (*standardized_gradient[3][3])(StandardizedScratch s, int64_t n, StandardizedSlopes slopes, bool stream,
                                      void* out, float subtracted);
};

// The table of the widest instruction set that this machine has and that does not exceed the limit.
const DivergenceKernels& divergence_kernels(int isa_limit);

}  // namespace kdfast
