// Rows of kd_loss for a teacher's k largest classes: the divergence over k + 1 outcomes, the last of which, the tail,
// is "any other class".
#pragma once

#include <cmath>

#include "common/simd.h"
#include "kd_loss/call_context.h"
#include "kd_loss/prefetch.h"

namespace kdfast {

// Scratch of one thread, k elements each, for the teacher's classes: the log-probabilities of the teacher (q) and the
// student (p), the student's exp(z - max z), and the class ids.
struct TopKScratch {
  double *log_q, *log_p, *e1;
  int32_t* ids;
};

// The student's classes that the teacher leaves out. Their exponents are b = (z - max z) / T.
struct Tail {
  double offset = 0;            // largest b among them, or 0 unless their sum is close to underflow
  double sum = 0;               // of their terms exp(b - offset)
  double log_normaliser = 0;    // log of the sum of exp(b) over all classes
  double log_p = 0, log_q = 0;  // log-probabilities of the tail for student and teacher
};

// x (log x - log y - shift) for x = exp(log_x), y = exp(log_y); 0 if x is 0 or underflows, for any y.
inline double divergence_term(double log_x, double log_y, double shift = 0) {
  const double x = std::exp(log_x);
  return x == 0 ? 0.0 : x * (log_x - log_y - shift);
}

// Recomputes the terms of the tail relative to its own largest exponent.
inline void rescale_tail(const KdLoss& a, const Terms& terms, const Scratch& s, const int32_t* ids, int64_t k,
                         int64_t i, float max_z, Tail* tail) {
  const int64_t n = a.logits.cols;
  for (int64_t c = 0; c < n; ++c)
    s.u[c] = static_cast<float>((element(a.logits, i, c) - static_cast<double>(max_z)) / terms.temperature);
  for (int64_t j = 0; j < k; ++j) s.u[ids[j]] = -kInf;
  tail->offset = -HUGE_VAL;
  for (int64_t c = 0; c < n; ++c) tail->offset = s.u[c] > tail->offset ? static_cast<double>(s.u[c]) : tail->offset;
  tail->sum = 0;
  for (int64_t c = 0; c < n; ++c) {
    const double term = tail->offset == -HUGE_VAL ? 0.0 : std::exp(static_cast<double>(s.u[c]) - tail->offset);
    s.e[c] = static_cast<float>(term);
    tail->sum += term;
  }
  if (tail->offset == -HUGE_VAL) tail->offset = 0;
}

// Removes the teacher's k classes from the terms s.e of a row and sums the others. The sum is accurate even if the tail
// is a tiny part of the whole.
inline Tail separate_tail(const CallContext& call, const Terms& terms, const Scratch& s, const int32_t* ids, int64_t k,
                          int64_t i, float max_z) {
  const KdLoss& a = call.args;
  const int64_t n = a.logits.cols;
  Tail tail;
  double top_sum = 0;
  bool repeated = false;
  for (int64_t j = 0; j < k; ++j) {
    const float e = s.e[ids[j]];
    repeated |= e < 0;  // marked by an earlier j: terms are not negative
    top_sum += static_cast<double>(e);
    s.e[ids[j]] = -1.0f;
  }
  if (repeated) call.repeated_row.store(i, std::memory_order_relaxed);
  for (int64_t j = 0; j < k; ++j) s.e[ids[j]] = 0.0f;
  tail.sum = call.kernels.sum(s.e, n);
  tail.log_normaliser = std::log(top_sum + tail.sum);
  if (tail.sum < 1e-30) rescale_tail(a, terms, s, ids, k, i, max_z, &tail);
  tail.log_p = std::log(tail.sum) + tail.offset - tail.log_normaliser;
  return tail;
}

// The teacher's log-probability of the tail, and the number of its other outcomes.
struct TeacherOutcomes {
  double log_q_tail;
  int64_t k;
};

// Computes the teacher's class ids and log-probabilities of a row. Classes whose logit is -inf are left in the tail.
inline TeacherOutcomes teacher_outcomes(const KdLoss& a, double temperature, const TopKScratch& t, int64_t row) {
  const int32_t* ids = a.classes + row * a.teacher.cols;
  const double tail = static_cast<double>(a.tail[row]);
  double top = tail;
  int64_t k = 0;
  for (int64_t j = 0; j < a.teacher.cols; ++j) {
    const double logit = element(a.teacher, row, j);
    t.ids[k] = ids[j];
    t.log_q[k] = logit / temperature;
    top = t.log_q[k] > top ? t.log_q[k] : top;
    k += logit != -HUGE_VAL;
  }
  double sum = std::exp(tail - top);
  for (int64_t j = 0; j < k; ++j) sum += std::exp(t.log_q[j] - top);
  const double log_normaliser = top + std::log(sum);
  for (int64_t j = 0; j < k; ++j) t.log_q[j] -= log_normaliser;
  return {tail - log_normaliser, k};
}

// Inputs of the gradient of a row other than its terms.
struct TopKRow {
  int64_t k;
  double kl, e1_sum;
  Power power;
  double ce_slope, kl_slope;  // derivatives of the result w.r.t. CE, and w.r.t. KL over T
  int64_t label;
};

// Derivative of the divergence w.r.t. the exponent of an outcome.
inline double divergence_slope(bool reverse, double log_p, double log_q, double kl) {
  return reverse ? divergence_term(log_p, log_q, kl) : std::exp(log_p) - std::exp(log_q);
}

inline void store_topk_gradient(const CallContext& call, const Scratch& s, const TopKScratch& t, const Tail& tail,
                                const TopKRow& r, int64_t i) {
  const KdLoss& a = call.args;
  const int64_t n = a.logits.cols;
  Slopes slopes;
  // A class of the tail has the probability exp(log_p) * term / sum; all of them share the tail's derivative.
  const double tail_slope = divergence_slope(a.reverse, tail.log_p, tail.log_q, r.kl);
  slopes.e = tail.sum == 0 ? 0.0f : static_cast<float>(r.kl_slope * tail_slope / tail.sum);
  // Logits of rescaled terms are so far below the largest one that exp(z - max z) is 0 (T >= 1, or e1 is kept).
  slopes.e1 = tail.offset == 0 || r.power == kPowerAny ? static_cast<float>(r.ce_slope / r.e1_sum) : 0.0f;
  const double subtracted = r.ce_slope * call.class_target;
  write_gradient(call, r.power, false, s, false, n, slopes, static_cast<float>(subtracted), gradient_row(a, i));
  double label_gradient = 0;
  if (r.label >= 0)
    label_gradient = static_cast<double>(e1_at(r.power, s, r.label) * slopes.e1 + s.e[r.label] * slopes.e);
  for (int64_t j = 0; j < r.k; ++j) {
    const double slope = divergence_slope(a.reverse, t.log_p[j], t.log_q[j], r.kl);
    const double g = r.ce_slope * t.e1[j] / r.e1_sum + r.kl_slope * slope;
    store_gradient(a, i, t.ids[j], static_cast<float>(g - subtracted));
    if (t.ids[j] == r.label) label_gradient = g;
  }
  if (r.label >= 0) store_gradient(a, i, r.label, static_cast<float>(label_gradient - r.ce_slope * call.label_target));
}

inline void compute_topk_row(const CallContext& call, const Scratch& s, const TopKScratch& t, int64_t i) {
  const KdLoss& a = call.args;
  Terms own;
  const Terms& terms = call.terms(i, &own);
  const int64_t n = a.logits.cols, label = label_of(a, terms, i);
  float max_z = 0;
  const float* z = load_floats(call, a.logits, i, {0, n}, s.e, &max_z);
  double z_target = label < 0 ? 0.0 : element(a.logits, i, label) - static_cast<double>(max_z);
  if (label >= 0 && a.label_smoothing > 0) z_target = expected_logit(a, z_target, call.kernels.total(z, s.e, n, max_z));
  int64_t next = i + 1;
  const Sums sums = call.kernels.student_sums[terms.power](z, n, max_z, terms.inverse_t, true, s,
                                                           Prefetcher(a, s.e).for_row(i, &next));
  const TeacherOutcomes teacher = teacher_outcomes(a, terms.temperature, t, teacher_row(a, i));
  Tail tail = separate_tail(call, terms, s, t.ids, teacher.k, i, max_z);
  tail.log_q = teacher.log_q_tail;
  double kl = a.reverse ? divergence_term(tail.log_p, tail.log_q) : divergence_term(tail.log_q, tail.log_p);
  for (int64_t j = 0; j < teacher.k; ++j) {
    const double d = element(a.logits, i, t.ids[j]) - static_cast<double>(max_z);
    t.e1[j] = std::exp(d);
    t.log_p[j] = d / terms.temperature - tail.log_normaliser;
    kl += a.reverse ? divergence_term(t.log_p[j], t.log_q[j]) : divergence_term(t.log_q[j], t.log_p[j]);
  }
  const double ce = label < 0 ? 0.0 : std::log(sums.e1) - z_target;
  const double factor = weight_of(a, i) * call.reduction_factor;
  store_loss(call, terms, i, factor, ce, kl);
  if (!a.grad) return;
  const double ce_slope = terms.use_ce ? factor * a.grad_scale * terms.ce_factor : 0.0;
  const double kl_slope = factor * a.grad_scale * terms.kl_factor / terms.temperature;
  store_topk_gradient(call, s, t, tail, {teacher.k, kl, sums.e1, terms.power, ce_slope, kl_slope, label}, i);
}

}  // namespace kdfast
