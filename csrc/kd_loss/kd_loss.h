// The knowledge-distillation loss (1 - alpha) CE(softmax(z), y) + alpha T^2 KL(softmax(t / T) || softmax(z / T)) of
// student logits z against labels y and teacher logits t, and its gradient with respect to z.
#pragma once

#include <cstdint>

#include "common/matrix.h"

namespace kdfast {

// Must match DIVERGENCE_CODES in kdfast/ops/kd_loss/native.py.
enum Divergence : int { kKl = 0, kJensenShannon = 1, kDecoupled = 2, kStandardized = 3 };

enum Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

// The operands, options and results of one call. Pointers marked "or null" are optional.
struct KdLoss {
  Matrix logits;          // (N, C), of the student
  Matrix teacher;         // (M, C) logits, or (M, k) logits of the classes in `classes` if that is set
  const int64_t* labels;  // (N,), or null if ce_factor is 0
  int64_t labels_stride;
  const int64_t* rows;  // (N,) teacher row of each sample, or null: row i for sample i
  int64_t rows_stride;
  // (M, k) contiguous class ids of a top-k teacher, or null: the teacher has all classes. A class whose logit is -inf
  // counts as left out.
  const int32_t* classes;
  const float* tail;     // (M,) log-mass of the classes that a top-k teacher leaves out; required with `classes`
  const float* weights;  // (N,) contiguous, or null
  bool use_ce, use_kl;   // whether the result includes each term, in at least some rows
  bool reverse;          // KL(softmax(z / T) || softmax(t / T)) instead
  int divergence;        // the term in place of KL
  // Weights of its two parts: of KL(teacher || mixture) and KL(student || mixture), or of the label against all other
  // classes and of those among themselves.
  double first_weight, second_weight;
  double ce_factor;  // 1 - alpha
  double kl_factor;  // alpha T^2, or alpha
  double temperature;
  // (N,) contiguous alpha and temperature of each row, or null: those of the call. If either is set, the factors of a
  // row follow from its own numbers and from those of the call.
  const double *alphas, *temperatures;
  double alpha;
  bool t_squared;
  double label_smoothing;  // s: the target of the cross-entropy is (1 - s) onehot(y) + s / C
  int64_t ignore_index;    // rows with this label have loss 0 and gradient 0
  int reduction;
  double grad_scale;  // power of two that the gradient is multiplied by, so that fp16 does not underflow
  float* loss;        // (N,) for kNone, else one element
  float* ce;          // (N,) unweighted cross-entropy of each row, or null
  float* kl;          // (N,) unweighted divergence of each row, or null
  void* grad;         // (N, C) contiguous in the dtype of logits, or null
  int threads;
  int isa_limit;  // highest instruction set to use: 0 baseline, 1 x86-64-v3, 2 x86-64-v4
};

// Throws std::invalid_argument if sizes are inconsistent, alpha or the temperature of a row is out of range or a
// teacher row repeats a class, and std::out_of_range if a label, row or class id is outside its range.
void kd_loss(const KdLoss& args);

// out[i, j] = grad[i, j] * factor[i * factor_stride] * scale; out may be grad.
void scale_rows(const void* grad, void* out, int dtype, int64_t rows, int64_t cols, const float* factor,
                int64_t factor_stride, float scale, int threads);

}  // namespace kdfast
