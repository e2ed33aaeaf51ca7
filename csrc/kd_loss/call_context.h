// State shared by all rows of a kd_loss call, and the terms, operands and results of a single row.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/matrix.h"
#include "kd_loss/kd_loss.h"
#include "kd_loss/row_loops.h"

namespace kdfast {

// Which terms a row has, with their factors and the temperature.
struct Terms {
  bool use_ce, use_kl;
  double ce_factor, kl_factor, temperature;
  double kl_slope;  // kl_factor / T
  float inverse_t;  // 1 / T, or 1 without a teacher
  Power power;
};

inline Power power_of(double temperature) {
  return temperature == 1 ? kPowerOne : temperature == 2 ? kPowerTwo : temperature == 4 ? kPowerFour : kPowerAny;
}

inline Terms make_terms(bool use_ce, bool use_kl, double ce_factor, double kl_factor, double temperature) {
  return {use_ce,
          use_kl,
          ce_factor,
          kl_factor,
          temperature,
          kl_factor / temperature,
          use_kl ? static_cast<float>(1.0 / temperature) : 1.0f,
          use_ce && use_kl ? power_of(temperature) : kPowerOne};
}

inline Terms terms_of_row(const KdLoss& a, int64_t i) {
  const double alpha = a.alphas ? a.alphas[i] : a.alpha, t = a.temperatures ? a.temperatures[i] : a.temperature;
  return make_terms(alpha < 1, alpha > 0, 1 - alpha, a.t_squared ? alpha * (t * t) : alpha, t);
}

struct CallContext {
  const KdLoss& args;
  const RowKernels& kernels;
  Terms common;             // of all rows, unless they have their own
  double reduction_factor;  // factor common to all rows of the result
  double class_target;      // probability of every class in the target of the cross-entropy, s / C
  double label_target;      // that of the label, 1 - s + s / C
  double* losses;
  std::atomic<int64_t>& repeated_row;  // a row whose teacher repeats a class, or -1

  // Returns the terms of row i; they are in `own` if rows have their own.
  const Terms& terms(int64_t i, Terms* own) const {
    if (!args.alphas && !args.temperatures) return common;
    return *own = terms_of_row(args, i);
  }
};

inline bool is_counted(const KdLoss& a, int64_t i) {
  return !a.labels || a.labels[i * a.labels_stride] != a.ignore_index;
}

// Whether row i has a divergence.
inline bool reads_teacher(const KdLoss& a, int64_t i) { return a.use_kl && !(a.alphas && a.alphas[i] == 0); }

// The label, or -1 if the row has no cross-entropy.
inline int64_t label_of(const KdLoss& a, const Terms& terms, int64_t i) {
  return terms.use_ce ? a.labels[i * a.labels_stride] : -1;
}

inline int64_t teacher_row(const KdLoss& a, int64_t i) { return a.rows ? a.rows[i * a.rows_stride] : i; }

inline double weight_of(const KdLoss& a, int64_t i) { return a.weights ? static_cast<double>(a.weights[i]) : 1.0; }

// Stores the contribution of row i. A term that is not used is left out, even if it is infinite.
inline void store_loss(const CallContext& call, const Terms& terms, int64_t i, double factor, double ce, double kl) {
  const KdLoss& a = call.args;
  call.losses[i] = factor * ((terms.use_ce ? terms.ce_factor * ce : 0.0) + (terms.use_kl ? terms.kl_factor * kl : 0.0));
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

// Writes n classes of the gradient from the kept terms, less `subtracted`, which is 0 unless the label is smoothed.
inline void write_gradient(const CallContext& call, Power power, bool reverse, const Scratch& s, bool has_teacher,
                           int64_t n, const Slopes& slopes, float subtracted, void* out) {
  const KdLoss& a = call.args;
  const bool stream = is_streamed(a.logits.dtype, a.logits.cols);
  if (subtracted == 0)
    call.kernels.gradient[reverse][power][a.logits.dtype](s, has_teacher, n, slopes, stream, out);
  else
    call.kernels.smoothed_gradient[reverse][power][a.logits.dtype](s, has_teacher, n, slopes, stream, out, subtracted);
}

// The expected logit under the target of the cross-entropy, relative to max z, from that of the label. `logits` are
// those of all classes, relative to max z.
inline double expected_logit(const KdLoss& a, double of_label, const Total& logits) {
  const double mean = logits.count < static_cast<double>(a.logits.cols) ? -HUGE_VAL : logits.sum / logits.count;
  return (1 - a.label_smoothing) * of_label + a.label_smoothing * mean;
}

// e1 of one class, from the kept terms.
inline float e1_at(Power power, const Scratch& s, int64_t column) {
  if (power == kPowerAny) return s.e1[column];
  float e = s.e[column];
  for (int i = 0; i < power; ++i) e *= e;
  return e;
}

}  // namespace kdfast
