// Row operations of a softmax head: what happens to each sample between two matrix products.
#pragma once

#include <cstdint>

namespace kdfast {

// Logits (rows, classes) of the head, and the loss (1 - alpha) CE + alpha T^2 KL. Elements are double where `wide`,
// else float; strides in elements, the columns being contiguous.
struct HeadLogits {
  const void* logits;
  int64_t rows, classes, stride;
  double alpha, temperature;
  bool wide;
  int threads, isa_limit;  // ignored on a GPU
};

// The gradient r of each row's loss with respect to its logits, and its norm times that of the features.
struct HeadResiduals {
  HeadLogits head;
  const int64_t* labels;  // (rows,) contiguous, or null when alpha is 1
  const void* teacher;    // (rows, classes), or null when alpha is 0
  int64_t teacher_stride;
  const void* features;  // (rows, width), or null: factor 1
  int64_t width, features_stride;
  double extra;     // added to the squared norm of the features: 1 for a bias
  void* residuals;  // (rows, classes) contiguous, or null
  void* norms;      // (rows,), or null
};

// Replaces the products of each sample with some vectors by S times them, with
// S = (1 - alpha) (diag(p) - p p^T) + alpha (diag(p_T) - p_T p_T^T). On a CPU those of a sample that has a logit which
// is not finite become NaN.
struct HeadCurvature {
  HeadLogits head;
  void* products;  // on a CPU (vectors, classes, rows), rows `stride` apart; on a GPU (rows, vectors, classes)
  int64_t vectors;
  int64_t stride;  // ignored on a GPU
};

// Adds `scale` B^T X to `out`, with B = S A and A = X V^T, in floats: the Hessian of the sum of all losses times some
// vectors.
struct HeadProducts {
  HeadLogits head;
  const float* features;  // (rows, width), or with a bias one more that is 1 and is not stored
  int64_t width, features_stride;
  bool bias;
  const float* v;  // (vectors, classes, width + bias) contiguous
  int64_t vectors;
  double scale;
  float* out;  // as v
};

void check_head(const HeadLogits& head);

// Whether head_products can run here, for that many products (vectors times classes) of a sample.
bool head_products_fit(int64_t numbers, int64_t width);

// Throw std::invalid_argument on inconsistent sizes. Labels must lie in [0, classes).
void head_residuals(const HeadResiduals& args);
void head_curvature(const HeadCurvature& args);
void head_products(const HeadProducts& args);

// The same on the current device, in a CUDA stream, without waiting. Throw std::runtime_error when a launch fails.
void head_residuals_cuda(const HeadResiduals& args, void* stream);
void head_curvature_cuda(const HeadCurvature& args, void* stream);

}  // namespace kdfast
