// Rows of kd_loss for a teacher that has all classes, or without a teacher.
//
// With the terms of row_loops.h and the sums S over the classes:
//   CE = log S(e1) - (z_target - max z), where z_target is the label's logit unless the label is smoothed
//   KL(t || z) = S(u (a - b)) / S(u) + log(S(e) / S(u))
//   KL(z || t) = S(e (b - a)) / S(e) - log(S(e) / S(u)) - (origin - max t) / T
#pragma once

#include <algorithm>

#include "kd_loss/call_context.h"
#include "kd_loss/prefetch.h"
#include "kd_loss/row_loops.h"

namespace kdfast {

// A row, or some of its classes.
struct DenseRow {
  const Terms* terms;
  int64_t index, label;
  Scratch s;
  const float *z, *t;
  float max_z, max_t, origin;  // the origin of the exponents a
  double z_target;             // expected logit under the label's target, relative to max z
  Sums sums;
};

// First position of a value in p[0, n), or n.
inline int64_t find_value(const float* p, int64_t n, float value) {
  constexpr int64_t kStep = 64;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    int found = 0;
    for (int64_t j = 0; j < kStep; ++j) found |= p[i + j] == value;
    if (found) break;
  }
  while (i < n && p[i] != value) ++i;
  return i;
}

// Origin of the teacher's exponents in a reverse divergence: its logit of the student's most probable class. The gaps
// b - a are then small where the student's probability is large, even if the logits are far apart.
inline float reverse_origin(const float* z, const float* t, int64_t n, float max_z, float max_t) {
  const int64_t at = find_value(z, n, max_z);
  return at == n || t[at] == -kInf ? max_t : t[at];
}

// Loads some classes of row r->index.
inline void load_span(const CallContext& call, Span span, DenseRow* r) {
  const KdLoss& a = call.args;
  r->z = load_floats(call, a.logits, r->index, span, r->s.e, &r->max_z);
  if (!r->terms->use_kl) return;
  r->t = load_floats(call, a.teacher, teacher_row(a, r->index), span, r->s.u, &r->max_t);
  r->origin = a.reverse ? reverse_origin(r->z, r->t, span.size, r->max_z, r->max_t) : r->max_t;
}

inline void sum_span(const CallContext& call, int64_t size, const Prefetch& prefetch, DenseRow* r) {
  const KdLoss& a = call.args;
  const Terms& terms = *r->terms;
  const bool keep = a.grad != nullptr;
  r->sums = terms.use_kl
                ? call.kernels.pair_sums[a.reverse][terms.power](r->z, r->t, size, r->max_z, r->max_t, r->origin,
                                                                 terms.inverse_t, keep, r->s, prefetch)
                : call.kernels.student_sums[terms.power](r->z, size, r->max_z, terms.inverse_t, keep, r->s, prefetch);
}

// Stores the loss of a row from log sums.e1 and log(sums.e / sums.u). Returns the factor of the row in the result.
inline double store_row_loss(const CallContext& call, const DenseRow& r, double log_e1, double log_ratio) {
  const KdLoss& a = call.args;
  const Terms& terms = *r.terms;
  const double ce = r.label < 0 ? 0.0 : log_e1 - r.z_target;
  double kl = 0;
  if (terms.use_kl && a.reverse) {
    const double shift = (static_cast<double>(r.origin) - static_cast<double>(r.max_t)) / terms.temperature;
    kl = r.sums.cross / r.sums.e - (log_ratio + shift);
  } else if (terms.use_kl) {
    kl = r.sums.cross / r.sums.u + log_ratio;
  }
  const double factor = weight_of(a, r.index) * call.reduction_factor;
  store_loss(call, terms, r.index, factor, ce, kl);
  return factor;
}

inline Slopes slopes_of(const CallContext& call, const DenseRow& r, double factor) {
  const KdLoss& a = call.args;
  const Terms& terms = *r.terms;
  const Sums& sums = r.sums;
  const double ce = terms.use_ce ? factor * terms.ce_factor : 0.0, kl = terms.use_kl ? factor * terms.kl_slope : 0.0;
  Slopes slopes;
  slopes.e1 = static_cast<float>(ce / sums.e1);
  slopes.e = static_cast<float>(kl / sums.e);
  if (terms.use_kl) slopes.u = static_cast<float>(kl / sums.u);
  if (terms.use_kl && a.reverse) slopes.shift = static_cast<float>(sums.cross / sums.e);
  return slopes;
}

// Stores the gradient of the label's class, with its share `target` subtracted, from the kept terms of the classes from
// `begin` on. Recomputed, so that the element is rounded to its dtype only once.
inline void store_label_gradient(const CallContext& call, const DenseRow& r, int64_t begin, const Slopes& slopes,
                                 float target) {
  const KdLoss& a = call.args;
  const int64_t at = r.label - begin;
  const float e = r.s.e[at], u = r.s.u[at];
  const float kl_part = !r.terms->use_kl ? 0.0f
                        : !a.reverse     ? e * slopes.e - u * slopes.u
                        : e == 0.0f      ? 0.0f
                                         : e * slopes.e * (u - slopes.shift);
  store_gradient(a, r.index, r.label, e1_at(r.terms->power, r.s, at) * slopes.e1 + kl_part - target);
}

// Stores the gradient of some classes of a row from their kept terms.
inline void store_gradient_span(const CallContext& call, const DenseRow& r, Span span, const Slopes& slopes,
                                double factor) {
  const KdLoss& a = call.args;
  const Terms& terms = *r.terms;
  char* out = gradient_row(a, r.index) + span.begin * size_of(a.logits.dtype);
  const double ce_slope = terms.use_ce ? factor * terms.ce_factor : 0.0;
  write_gradient(call, terms.power, terms.use_kl && a.reverse, r.s, terms.use_kl, span.size, slopes,
                 static_cast<float>(ce_slope * call.class_target), out);
  if (r.label < span.begin || r.label >= span.begin + span.size) return;
  store_label_gradient(call, r, span.begin, slopes, static_cast<float>(ce_slope * call.label_target));
}

// Several rows computed together: each step runs for all of them before the next step, since the steps of one row
// depend on each other.
class DenseRows {
 public:
  static constexpr int64_t kMaxRows = 8;          // 8 rows x 2 logarithms fill a vector of sixteen
  static constexpr int64_t kMaxFloats = 1 << 12;  // of scratch, which fit the L1 cache

  // Number of rows with `width` floats per term that are computed together.
  static int64_t capacity(int64_t width) { return std::clamp<int64_t>(kMaxFloats / (3 * width), 1, kMaxRows); }

  // `floats` is scratch of 3 * width floats for each of capacity(width) rows.
  DenseRows(const CallContext& call, float* floats, int64_t width)
      : call_(call),
        a_(call.args),
        floats_(floats),
        width_(width),
        capacity_(capacity(width)),
        prefetcher_(call.args, floats) {}

  // Adds row i, and computes the rows added so far if there is no room for more.
  void add(int64_t i) {
    DenseRow& r = rows_[size_];
    float* floats = floats_ + size_ * 3 * width_;
    r.terms = &call_.terms(i, &own_terms_[size_]);
    r.index = i;
    r.label = label_of(a_, *r.terms, i);
    r.s = {floats, floats + width_, floats + 2 * width_};
    load_span(call_, {0, a_.logits.cols}, &r);
    r.z_target = r.label < 0 ? 0.0 : static_cast<double>(r.z[r.label] - r.max_z);
    if (r.label >= 0 && a_.label_smoothing > 0)
      r.z_target = expected_logit(a_, r.z_target, call_.kernels.total(r.z, r.s.e, a_.logits.cols, r.max_z));
    if (++size_ == capacity_) finish();
  }

  void finish() {
    double logs[2 * kMaxRows];
    std::fill(logs, logs + 2 * kMaxRows, 1.0);
    int64_t next = size_ ? rows_[size_ - 1].index : 0;
    for (int64_t r = 0; r < size_; ++r) {
      ++next;
      sum_span(call_, a_.logits.cols, prefetcher_.for_row(rows_[r].index, &next), &rows_[r]);
      logs[r] = rows_[r].sums.e1;
      if (rows_[r].terms->use_kl) logs[kMaxRows + r] = rows_[r].sums.e / rows_[r].sums.u;
    }
    call_.kernels.logarithms(logs);
    for (int64_t r = 0; r < size_; ++r) store_row(rows_[r], logs[r], logs[kMaxRows + r]);
    size_ = 0;
  }

 private:
  void store_row(const DenseRow& r, double log_e1, double log_ratio) const {
    const double factor = store_row_loss(call_, r, log_e1, log_ratio) * a_.grad_scale;
    if (a_.grad) store_gradient_span(call_, r, {0, a_.logits.cols}, slopes_of(call_, r, factor), factor);
  }

  const CallContext& call_;
  const KdLoss& a_;
  float* floats_;
  int64_t width_, capacity_, size_ = 0;
  Prefetcher prefetcher_;
  DenseRow rows_[kMaxRows];
  Terms own_terms_[kMaxRows];
};

}  // namespace kdfast
