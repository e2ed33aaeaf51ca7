// Rows of kd_loss against a teacher's k largest classes: the divergence over k + 1 outcomes, the last being "any other
// class".
#pragma once

#include <cmath>

#include "common/simd.h"
#include "kd_loss/dense.h"

namespace kdfast {

constexpr int64_t kFetched = 4;  // rows ahead of the one that is computed

// Starts to fetch what the teacher says of row i: it lies anywhere, and is too short for the hardware to see it coming.
// Inlined by force: a function that does nothing but prefetch has no effect in GCC's eyes, which drops calls of it.
KDFAST_INLINE void fetch_topk(const KdLoss& a, int64_t i) {
  if (i >= a.logits.rows) return;
  const int64_t row = teacher_row(a, i), k = a.teacher.cols;
  if (row < 0 || row >= a.teacher.rows) return;  // an ignored row's, or not checked yet
  const char *values = row_of(a.teacher, row), *ids = reinterpret_cast<const char*>(a.classes + row * k);
  __builtin_prefetch(a.tail + row);
  for (int64_t at = 0; at < k * size_of(a.teacher.dtype); at += 64) __builtin_prefetch(values + at);
  for (int64_t at = 0; at < k * 4; at += 64) __builtin_prefetch(ids + at);
}

// Per outcome of one thread's row, k each: the teacher's and the student's log-probability, and the student's exp(z -
// max z).
struct TopK {
  double *log_q, *log_p, *e1;
};

// The student's classes that the teacher left out: their terms exp(b - offset), and log-probabilities of the whole and
// its outcome.
struct Rest {
  double offset = 0;  // largest exponent b = (z - max z) / T among them, or 0 while their sum is far from underflow
  double sum = 0;     // of exp(b - offset)
  double log_student = 0;  // log of the student's normaliser, relative to max z / T
  double log_p = 0, log_q = 0;
};

// x (log x - log y - shift) from the logarithms; zero where x is, even if it only underflowed, whatever y is.
inline double divergence_term(double log_x, double log_y, double shift = 0) {
  const double x = std::exp(log_x);
  return x == 0 ? 0.0 : x * (log_x - log_y - shift);
}

// Takes the k classes out of the row of terms and sums the rest, exactly enough for a rest that is a tiny part of the
// whole.
inline Rest split_rest(const Job& job, const Scratch& s, const int32_t* ids, int64_t i, float max_z) {
  const KdLoss& a = job.args;
  const int64_t n = a.logits.cols, k = a.teacher.cols;
  Rest rest;
  double chosen = 0;
  for (int64_t j = 0; j < k; ++j) chosen += static_cast<double>(s.e[ids[j]]);
  for (int64_t j = 0; j < k; ++j) s.e[ids[j]] = 0.0f;
  rest.sum = job.kernels.sum(s.e, n);
  rest.log_student = std::log(chosen + rest.sum);
  if (rest.sum < 1e-30) {
    // Their terms underflow beside the chosen ones: take them again, relative to their own largest.
    for (int64_t c = 0; c < n; ++c)
      s.u[c] = static_cast<float>((element(a.logits, i, c) - static_cast<double>(max_z)) / a.temperature);
    for (int64_t j = 0; j < k; ++j) s.u[ids[j]] = -kInf;
    rest.offset = -HUGE_VAL;
    for (int64_t c = 0; c < n; ++c) rest.offset = s.u[c] > rest.offset ? static_cast<double>(s.u[c]) : rest.offset;
    rest.sum = 0;
    for (int64_t c = 0; c < n; ++c) {
      const double term = rest.offset == -HUGE_VAL ? 0.0 : std::exp(static_cast<double>(s.u[c]) - rest.offset);
      s.e[c] = static_cast<float>(term);
      rest.sum += term;
    }
    if (rest.offset == -HUGE_VAL) rest.offset = 0;
  }
  rest.log_p = std::log(rest.sum) + rest.offset - rest.log_student;
  return rest;
}

// Teacher's log-probabilities of the k + 1 outcomes.
inline void teacher_outcomes(const KdLoss& a, const TopK& t, int64_t row, Rest* rest) {
  const int64_t k = a.teacher.cols;
  const double tail = static_cast<double>(a.tail[row]);
  double top = tail;
  for (int64_t j = 0; j < k; ++j) {
    t.log_q[j] = element(a.teacher, row, j) / a.temperature;
    top = t.log_q[j] > top ? t.log_q[j] : top;
  }
  double sum = std::exp(tail - top);
  for (int64_t j = 0; j < k; ++j) sum += std::exp(t.log_q[j] - top);
  const double norm = top + std::log(sum);
  for (int64_t j = 0; j < k; ++j) t.log_q[j] -= norm;
  rest->log_q = tail - norm;
}

struct TopKRow {
  const int32_t* ids;
  double kl, sum_one, hard, soft;
  int64_t label;
};

inline void topk_gradient(const Job& job, const Scratch& s, const TopK& t, const Rest& rest, const TopKRow& r,
                          int64_t i) {
  const KdLoss& a = job.args;
  const int64_t n = a.logits.cols, k = a.teacher.cols;
  Slopes slopes;
  // A class of the rest has probability exp(log_p) * term / sum; all of them share the outcome's pull.
  const double per_term =
      a.reverse ? divergence_term(rest.log_p, rest.log_q, r.kl) : std::exp(rest.log_p) - std::exp(rest.log_q);
  slopes.student = rest.sum == 0 ? 0.0f : static_cast<float>(r.soft * per_term / rest.sum);
  // Terms that were rescaled lie so far below the largest logit that exp(z - max z) vanishes (T >= 1, or e1 is kept).
  slopes.one = rest.offset == 0 || job.power == kPowerAny ? static_cast<float>(r.hard / r.sum_one) : 0.0f;
  job.kernels.gradient[0][job.power][a.logits.dtype](s, false, n, slopes, is_streamed(a.logits.dtype, n),
                                                     gradient_row(a, i));
  double g_label = 0;
  if (r.label >= 0)
    g_label = static_cast<double>(hard_term(job, s, r.label) * slopes.one + s.e[r.label] * slopes.student);
  for (int64_t j = 0; j < k; ++j) {
    const double bent =
        a.reverse ? divergence_term(t.log_p[j], t.log_q[j], r.kl) : std::exp(t.log_p[j]) - std::exp(t.log_q[j]);
    const double g = r.hard * t.e1[j] / r.sum_one + r.soft * bent;
    put_gradient(a, i, r.ids[j], static_cast<float>(g));
    if (r.ids[j] == r.label) g_label = g;
  }
  if (r.label >= 0) put_gradient(a, i, r.label, static_cast<float>(g_label - r.hard));
}

inline void topk_row(const Job& job, const Scratch& s, const TopK& t, int64_t i) {
  const KdLoss& a = job.args;
  const int64_t n = a.logits.cols, k = a.teacher.cols, label = label_of(a, i), row = teacher_row(a, i);
  const int32_t* ids = a.classes + row * k;
  float max_z = 0;
  const float* z = floats_of(job, a.logits, i, {0, n}, s.e, &max_z);
  int64_t next = i + 1;
  const Sums sums = job.kernels.student[job.power](z, n, max_z, static_cast<float>(1.0 / a.temperature), true, s,
                                                   Fetches(a, s.e).during(i, &next));
  Rest rest = split_rest(job, s, ids, i, max_z);
  teacher_outcomes(a, t, row, &rest);
  double kl = a.reverse ? divergence_term(rest.log_p, rest.log_q) : divergence_term(rest.log_q, rest.log_p);
  for (int64_t j = 0; j < k; ++j) {
    const double d = element(a.logits, i, ids[j]) - static_cast<double>(max_z);
    t.e1[j] = std::exp(d);
    t.log_p[j] = d / a.temperature - rest.log_student;
    kl += a.reverse ? divergence_term(t.log_p[j], t.log_q[j]) : divergence_term(t.log_q[j], t.log_p[j]);
  }
  const double ce = label < 0 ? 0.0 : std::log(sums.one) - (element(a.logits, i, label) - static_cast<double>(max_z));
  const double factor = weight_of(a, i) * job.common;
  put_loss(job, i, factor, ce, kl);
  if (!a.grad) return;
  const double hard = a.use_ce ? factor * a.hold * a.ce_factor : 0.0;
  topk_gradient(job, s, t, rest, {ids, kl, sums.one, hard, factor * a.hold * a.kl_factor / a.temperature, label}, i);
}

}  // namespace kdfast
