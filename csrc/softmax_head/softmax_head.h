// Row operations of a softmax head (multinomial logistic regression on features x, with logits z = W x): residuals,
// gradient norms, and products with the curvature. kdfast.ops.softmax_head has the PyTorch reference.
#pragma once

#include <cstdint>

namespace kdfast::softmax_head {

// Logits (rows, classes) of the head, and the loss (1 - alpha) CE + alpha T^2 KL. Elements are double if `is_double`,
// else float. Strides count elements; columns are contiguous.
struct Logits {
  const void* data;
  int64_t rows, classes, stride;
  double alpha, temperature;
  bool is_double;
  int threads, isa_limit;  // ignored on a GPU
};

// The residual r of each row, the gradient of its loss with respect to its logits:
// r = (1 - alpha) (p - onehot) + alpha T (p_T - q_T). Its norm times the norm of the row's features is the norm of the
// row's weight gradient r x^T.
struct Residuals {
  Logits logits;
  const int64_t* labels;  // (rows,) contiguous, or null if alpha is 1
  const void* teacher;    // (rows, classes) logits, or null if alpha is 0
  int64_t teacher_stride;
  const void* features;  // (rows, width), or null: factor 1
  int64_t width, features_stride;
  double extra;     // added to the squared norm of the features: 1 for a bias
  void* residuals;  // (rows, classes) contiguous, or null
  void* norms;      // (rows,), or null
};

// Replaces the products A of each sample with each of some vectors by S A, where
// S = (1 - alpha) (diag(p) - p p^T) + alpha (diag(p_T) - p_T p_T^T). On a CPU, a sample with a logit that is not finite
// gets NaN.
struct Curvature {
  Logits logits;
  void* products;  // on a CPU (vectors, classes, rows) with classes `stride` apart; on a GPU (rows, vectors, classes)
  int64_t vectors;
  int64_t stride;  // ignored on a GPU
};

// Adds `scale` B^T X to `out`, where B = S A and A = X V^T, in float: the Hessian of the sum of all losses times some
// vectors.
struct HessianProducts {
  Logits logits;
  const float* features;  // (rows, width); a bias is one more feature that is 1 and not stored
  int64_t width, features_stride;
  bool bias;
  const float* v;  // (vectors, classes, width + bias) contiguous
  int64_t vectors;
  double scale;
  float* out;  // like v
};

// The functions below throw std::invalid_argument if sizes are inconsistent. Labels must lie in [0, classes).
void check(const Logits& logits);

void compute_residuals(const Residuals& args);
void apply_curvature(const Curvature& args);

// Whether add_hessian_products supports this machine and these sizes; `product_count` is vectors times classes.
bool hessian_products_fit(int64_t product_count, int64_t width);
void add_hessian_products(const HessianProducts& args);

// On the current device, in a CUDA stream. They do not synchronize with the device. Throw std::runtime_error if a
// launch fails.
void compute_residuals_cuda(const Residuals& args, void* stream);
void apply_curvature_cuda(const Curvature& args, void* stream);

}  // namespace kdfast::softmax_head
