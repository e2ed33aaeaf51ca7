// State shared by all rows of a kd_loss call, and the operands and results of a single row.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/dtype.h"
#include "common/matrix.h"
#include "kd_loss/kd_loss.h"
#include "kd_loss/row_loops.h"

namespace kdfast {

struct CallContext {
  const KdLoss& args;
  const RowKernels& kernels;
  Power power;
  double reduction_factor;  // factor common to all rows of the result
  double kl_slope;          // kl_factor / T
  float inverse_t;          // 1 / T, or 1 without a teacher
  double* losses;
  std::atomic<int64_t>& repeated_row;  // a row whose teacher repeats a class, or -1
};

inline bool is_counted(const KdLoss& a, int64_t i) {
  return !a.labels || a.labels[i * a.labels_stride] != a.ignore_index;
}

inline int64_t label_of(const KdLoss& a, int64_t i) { return a.use_ce ? a.labels[i * a.labels_stride] : -1; }

inline int64_t teacher_row(const KdLoss& a, int64_t i) { return a.rows ? a.rows[i * a.rows_stride] : i; }

inline double weight_of(const KdLoss& a, int64_t i) { return a.weights ? static_cast<double>(a.weights[i]) : 1.0; }

// Stores the contribution of row i. A term that is not used is left out, even if it is infinite.
inline void store_loss(const CallContext& call, int64_t i, double factor, double ce, double kl) {
  const KdLoss& a = call.args;
  call.losses[i] = factor * ((a.use_ce ? a.ce_factor * ce : 0.0) + (a.use_kl ? a.kl_factor * kl : 0.0));
  if (a.ce) a.ce[i] = static_cast<float>(ce);
  if (a.kl) a.kl[i] = static_cast<float>(kl);
}

inline char* gradient_row(const KdLoss& a, int64_t i) {
  return static_cast<char*>(a.grad) + i * a.logits.cols * size_of(a.logits.dtype);
}

inline void store_gradient(const KdLoss& a, int64_t i, int64_t column, float value) {
  char* p = gradient_row(a, i) + column * size_of(a.logits.dtype);
  if (a.logits.dtype == kFloat32)
    encode_one(reinterpret_cast<float*>(p), value);
  else if (a.logits.dtype == kBFloat16)
    encode_one(reinterpret_cast<BFloat16*>(p), value);
  else
    encode_one(reinterpret_cast<Float16*>(p), value);
}

// Classes [begin, begin + size) of a row.
struct Span {
  int64_t begin, size;
};

// Returns classes of a row as contiguous floats, and their largest: the row itself if it has that layout (then only its
// partial vector is copied), else a copy in `buffer`.
inline const float* load_floats(const CallContext& call, const Matrix& m, int64_t row, Span span, float* buffer,
                                float* largest) {
  const char* base = row_address(m, row) + span.begin * m.col_stride * size_of(m.dtype);
  const bool direct = m.dtype == kFloat32 && m.col_stride == 1;
  *largest = call.kernels.load[m.dtype](base, m.col_stride, span.size, buffer, !direct);
  return direct ? reinterpret_cast<const float*>(base) : buffer;
}

// e1 of one class, from the kept terms.
inline float e1_at(const CallContext& call, const Scratch& s, int64_t column) {
  if (call.power == kPowerAny) return s.e1[column];
  float e = s.e[column];
  for (int i = 0; i < call.power; ++i) e *= e;
  return e;
}

}  // namespace kdfast
