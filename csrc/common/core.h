// The whole C++ surface of kdfast: plain functions over pointers, sizes, strides and dtype codes.
#pragma once

#include <cstdint>

namespace kdfast {

// Name of the widest instruction set the function clones will use on this machine: "x86-64-v4", "x86-64-v3" or
// "default".
const char* isa();

// A strided matrix; strides in elements, dtype a code of dtype.h.
struct Matrix {
  const void* data;
  int64_t rows, cols, row_stride, col_stride;
  int dtype;
};

enum Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

// Row losses (1 - alpha) CE + alpha T^2 KL, and their gradient. Pointers marked "or null" are optional.
struct KdLoss {
  Matrix logits;          // (N, C)
  Matrix teacher;         // (M, C) logits, or (M, k) values when classes is set
  const int64_t* labels;  // (N,), or null when ce_factor is 0
  int64_t labels_stride;
  const int64_t* rows;  // (N,) rows of the teacher, or null: row i
  int64_t rows_stride;
  const int32_t* classes;  // (M, k) contiguous, or null: a full teacher
  const float* tail;       // (M,) log-mass of the classes left out, with classes
  const float* weights;    // (N,) contiguous, or null
  bool use_ce, use_kl, reverse;
  double ce_factor, kl_factor;  // 1 - alpha; alpha T^2 or alpha
  double temperature;
  int64_t ignore_index;
  int reduction;
  double hold;  // the gradient is written times this power of two, so that fp16 does not underflow before it is scaled
  float* loss;  // (N,) for kNone, else one element
  float* ce;    // (N,) unweighted cross-entropy, or null
  float* kl;    // (N,) unweighted divergence, or null
  void* grad;   // (N, C) contiguous in the dtype of logits, or null
  int threads;
  int isa_limit;  // highest instruction set to use: 0 baseline, 1 x86-64-v3, 2 x86-64-v4
};

// Throws std::invalid_argument on inconsistent sizes and std::out_of_range on a label, row or class id outside its
// range.
void kd_loss(const KdLoss& args);

// out[i, j] = grad[i, j] * factor[i * factor_stride] * scale; out may be grad.
void scale_rows(const void* grad, void* out, int dtype, int64_t rows, int64_t cols, const float* factor,
                int64_t factor_stride, float scale, int threads);

// Windows of zero-padded uint8 images, perhaps mirrored, each pixel through a table.
struct ShiftViews {
  const uint8_t* images;  // (B, H, W, 3) contiguous
  const int32_t* moves;   // (B, 3) contiguous: top and left in [0, 2 pad], flip in {0, 1}
  const float* scale;     // (3,): a value is pixel * scale + bias, rounded after each operation
  const float* bias;      // (3,)
  int64_t batch, height, width, pad;
  void* out;  // (B, H, W, 3) contiguous
  int dtype;  // of out
  int threads, isa_limit;
};

// Throws std::invalid_argument on inconsistent sizes and on a move outside the padded image.
void shift_views(const ShiftViews& args);

// What stands at `position` of the permutation of [0, size) that each of `count` keys names. Throws
// std::invalid_argument.
void shuffled_at(int64_t position, int64_t size, const uint64_t* keys, int64_t count, int64_t* out, int threads);

}  // namespace kdfast
