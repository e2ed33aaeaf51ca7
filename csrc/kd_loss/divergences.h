// Rows of kd_loss for the divergences other than KL. A row is computed as a whole, from the terms of row_loops.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kd_loss/call_context.h"
#include "kd_loss/divergence_loops.h"
#include "kd_loss/prefetch.h"

namespace kdfast {

// A probability given by its log-odds. No difference from 1 is formed, so both p and 1 - p are accurate.
class Odds {
 public:
  explicit Odds(double log_odds) : log_odds_(log_odds), small_(std::exp(-std::abs(log_odds))) {}

  double p() const { return (log_odds_ > 0 ? 1.0 : small_) / (1 + small_); }
  double rest() const { return (log_odds_ > 0 ? small_ : 1.0) / (1 + small_); }
  double log_p() const { return (log_odds_ > 0 ? 0.0 : log_odds_) - std::log1p(small_); }
  double log_rest() const { return (log_odds_ > 0 ? -log_odds_ : 0.0) - std::log1p(small_); }
  bool is_above_half() const { return log_odds_ > 0; }

 private:
  double log_odds_, small_;
};

// KL((q, 1 - q) || (p, 1 - p)).
inline double pair_divergence(const Odds& q, const Odds& p) {
  const double first = q.p() == 0 ? 0.0 : q.p() * (q.log_p() - p.log_p());
  return first + (q.rest() == 0 ? 0.0 : q.rest() * (q.log_rest() - p.log_rest()));
}

// q - p.
inline double difference(const Odds& q, const Odds& p) {
  return q.is_above_half() && p.is_above_half() ? p.rest() - q.rest() : q.p() - p.p();
}

class DivergenceRows {
 public:
  static constexpr int64_t kArrays = 5;  // of scratch

  // `floats` is scratch of kArrays * width floats.
  DivergenceRows(const CallContext& call, float* floats, int64_t width)
      : call_(call),
        a_(call.args),
        kernels_(divergence_kernels(call.args.isa_limit)),
        n_(call.args.logits.cols),
        s_{floats, floats + width, floats + 2 * width},
        fourth_(floats + 3 * width),
        fifth_(floats + 4 * width),
        prefetcher_(call.args, floats),
        terms_(call.common) {}

  void add(int64_t i) {
    int64_t after = i + 1;
    next_ = prefetcher_.for_row(i, &after);
    call_.terms(i, &terms_);  // stays `common` if that is the same for all rows
    factor_ = weight_of(a_, i) * call_.reduction_factor;
    ce_slope_ = terms_.use_ce ? factor_ * a_.grad_scale * terms_.ce_factor : 0.0;
    kl_slope_ = factor_ * a_.grad_scale * terms_.kl_slope;
    if (a_.divergence == kJensenShannon)
      add_jensen_shannon(i);
    else if (a_.divergence == kDecoupled)
      add_decoupled(i);
    else
      add_standardized(i);
  }

 private:
  void add_jensen_shannon(int64_t i) {
    const int64_t label = label_of(a_, terms_, i);
    float max_z = 0, max_t = 0;
    const float* z = load_floats(call_, a_.logits, i, {0, n_}, fourth_, &max_z);
    const float* t = load_floats(call_, a_.teacher, teacher_row(a_, i), {0, n_}, fifth_, &max_t);
    copy_end(fourth_, s_.e);
    copy_end(fifth_, s_.u);
    double z_target = label < 0 ? 0.0 : static_cast<double>(z[label] - max_z);
    if (is_smoothed(label)) z_target = expected_logit(a_, z_target, call_.kernels.total(z, fourth_, n_, max_z));
    const Sums sums =
        call_.kernels.pair_sums[0][terms_.power](z, t, n_, max_z, max_t, max_t, terms_.inverse_t, true, s_, next_);
    const double teacher = a_.first_weight, student = a_.second_weight, log_ratio = std::log(sums.u / sums.e);
    const Mixture m{max_z,
                    max_t,
                    terms_.inverse_t,
                    static_cast<float>(teacher),
                    static_cast<float>(student * (sums.u / sums.e)),
                    static_cast<float>(log_ratio)};
    const MixtureSums cross = kernels_.mixture(z, t, fourth_, fifth_, n_, m, s_);
    const double mean = cross.student / sums.e, rounding = log_ratio - static_cast<double>(m.log_ratio);
    const double ce = label < 0 ? 0.0 : std::log(sums.e1) - z_target;
    store_loss(call_, terms_, i, factor_, ce, teacher * (cross.teacher / sums.u) + student * (mean + rounding));
    if (!a_.grad) return;
    const Slopes slopes{static_cast<float>(ce_slope_ / sums.e1), static_cast<float>(student * kl_slope_ / sums.e), 0,
                        static_cast<float>(mean)};
    write(i, true, slopes);
    if (label < 0) return;
    const float e = s_.e[label], of_label = e == 0.0f ? 0.0f : e * slopes.e * (s_.u[label] - slopes.shift);
    store_gradient(a_, i, label, of_cross_entropy(e1_at(terms_.power, s_, label), slopes.e1) + of_label);
  }

  // Sums over the classes other than the label, whose logit is removed from the rows before. The probability of the
  // label follows from its odds against them, also in the cross-entropy.
  void add_decoupled(int64_t i) {
    const int64_t label = a_.labels[i * a_.labels_stride];
    float max_z = 0, max_t = 0;
    const double z_label = load_others(a_.logits, i, label, s_.e, &max_z);
    const Total others = terms_.use_ce && a_.label_smoothing > 0 ? call_.kernels.total(s_.e, s_.e, n_, max_z) : Total{};
    const double t_label = load_others(a_.teacher, teacher_row(a_, i), label, s_.u, &max_t);
    const Sums sums = call_.kernels.pair_sums[0][terms_.power](s_.e, s_.u, n_, max_z, max_t, max_t, terms_.inverse_t,
                                                               true, s_, next_);
    const double log_e = std::log(sums.e), log_u = std::log(sums.u);
    const Odds p1(z_label - static_cast<double>(max_z) - (terms_.use_ce ? std::log(sums.e1) : 0.0));
    const Odds p((z_label - static_cast<double>(max_z)) / terms_.temperature - log_e);
    const Odds q((t_label - static_cast<double>(max_t)) / terms_.temperature - log_u);
    const double first = a_.first_weight, second = sums.u == 0 ? 0.0 : a_.second_weight;
    double divergence = first == 0 ? 0.0 : first * pair_divergence(q, p);
    if (second != 0) divergence += second * (sums.e == 0 ? HUGE_VAL : sums.cross / sums.u + (log_e - log_u));
    store_loss(call_, terms_, i, factor_, terms_.use_ce ? decoupled_ce(p1, others, sums.e1) : 0.0, divergence);
    if (!a_.grad) return;
    const double gap = difference(q, p);
    Slopes slopes;
    if (sums.e1 != 0) slopes.e1 = static_cast<float>(ce_slope_ * p1.rest() / sums.e1);
    if (sums.e != 0) slopes.e = static_cast<float>(kl_slope_ * (second + first * gap) / sums.e);
    if (sums.u != 0) slopes.u = static_cast<float>(kl_slope_ * second / sums.u);
    write(i, false, slopes);
    const double of_ce = terms_.use_ce ? ce_slope_ * (p1.rest() - (1 - call_.label_target)) : 0.0;
    store_gradient(a_, i, label, static_cast<float>(-of_ce - kl_slope_ * first * gap));
  }

  void add_standardized(int64_t i) {
    const int64_t label = label_of(a_, terms_, i);
    Standardization student{}, teacher{};
    const float* z = load_floats(call_, a_.logits, i, {0, n_}, s_.e, &student.max);
    const float* t = load_floats(call_, a_.teacher, teacher_row(a_, i), {0, n_}, s_.u, &teacher.max);
    const Spread spread = standardize(z, s_.e, &student);
    double z_target = label < 0 ? 0.0 : static_cast<double>(z[label] - student.max);
    if (is_smoothed(label)) z_target = expected_logit(a_, z_target, spread.total);
    standardize(t, s_.u, &teacher);
    const StandardizedScratch scratch{s_.e, s_.u, s_.e1, fourth_};
    const StandardizedSums sums = kernels_.standardized_sums[terms_.use_ce](z, t, n_, student, teacher, scratch, next_);
    const double ce = label < 0 ? 0.0 : std::log(sums.e1) - z_target;
    store_loss(call_, terms_, i, factor_, ce, sums.cross / sums.u + std::log(sums.e / sums.u));
    if (!a_.grad) return;
    const double slope = kl_slope_ / (spread.deviation + kEpsilon);
    // The part of the gradient that the deviation removes, along the centered logits.
    const double along = (sums.student / sums.e - sums.teacher / sums.u) * terms_.temperature;
    StandardizedSlopes slopes;
    if (terms_.use_ce) slopes.e1 = static_cast<float>(ce_slope_ / sums.e1);
    slopes.e = static_cast<float>(slope / sums.e);
    slopes.u = static_cast<float>(slope / sums.u);
    if (spread.deviation != 0)
      slopes.centered = static_cast<float>(-slope * along / (spread.deviation * (spread.total.count - 1)));
    const int labels = !terms_.use_ce ? kNoLabels : a_.label_smoothing == 0 ? kOneHot : kSmoothed;
    kernels_.standardized_gradient[labels][a_.logits.dtype](scratch, n_, slopes, is_streamed(a_.logits.dtype, n_),
                                                            gradient_row(a_, i), uniform_slope());
    if (label < 0) return;
    const float of_label = s_.e[label] * slopes.e - s_.u[label] * slopes.u + fourth_[label] * slopes.centered;
    store_gradient(a_, i, label, of_cross_entropy(s_.e1[label], slopes.e1) + of_label);
  }

  static constexpr double kEpsilon = 1e-7;  // STANDARDIZATION_EPSILON of reference.py

  struct Spread {
    Total total;
    double deviation;
  };

  bool is_smoothed(int64_t label) const { return label >= 0 && a_.label_smoothing > 0; }

  // Part of the gradient that the target of the cross-entropy subtracts at every class.
  float uniform_slope() const { return static_cast<float>(ce_slope_ * call_.class_target); }

  // The gradient of the cross-entropy at the label. It is small where the label is almost certain, so that its two
  // large parts are subtracted before another is added.
  float of_cross_entropy(float e1, float slope) const {
    return e1 * slope - static_cast<float>(ce_slope_ * call_.label_target);
  }

  // The cross-entropy from the odds of the label and the logits of the other classes, relative to the largest of them,
  // whose terms add up to `sum`.
  double decoupled_ce(const Odds& p1, const Total& others, double sum) const {
    const double count = static_cast<double>(n_ - 1);
    if (a_.label_smoothing == 0) return -p1.log_p();
    const double of_others = count == 0             ? 0.0
                             : others.count < count ? -HUGE_VAL
                                                    : others.sum + count * (p1.log_rest() - std::log(sum));
    return -(1 - a_.label_smoothing) * p1.log_p() - call_.class_target * (p1.log_p() + of_others);
  }

  // Sets mean and scale of a row, whose last vector is padded in `end`.
  Spread standardize(const float* x, const float* end, Standardization* row) const {
    const Total total = call_.kernels.total(x, end, n_, row->max);
    row->mean = static_cast<float>(total.sum / total.count);
    const double squares = kernels_.squares(x, end, n_, row->max, row->mean);
    const double deviation = total.count > 1 ? std::sqrt(squares / (total.count - 1)) : 0.0;
    row->scale = static_cast<float>(1 / ((deviation + kEpsilon) * terms_.temperature));
    return {total, deviation};
  }

  // Copies a row to `out` with the label masked. Sets the largest of the others, 0 if there are none, and returns the
  // label's logit.
  double load_others(const Matrix& m, int64_t row, int64_t label, float* out, float* largest) const {
    *largest = call_.kernels.load[m.dtype](row_address(m, row), m.col_stride, n_, out, true);
    const float at_label = out[label];
    out[label] = -kInf;
    if (!(at_label < *largest)) *largest = call_.kernels.load[kFloat32](out, 1, n_, out, false);
    if (*largest == -kInf) *largest = 0;
    return at_label == kInf ? NAN : static_cast<double>(at_label);
  }

  // Copies the last vector of a row, if it is a partial one.
  void copy_end(const float* from, float* to) const {
    const int64_t begin = n_ / kLanes * kLanes;
    if (begin < n_) std::memcpy(to + begin, from + begin, kLanes * sizeof(float));
  }

  void write(int64_t i, bool reverse, const Slopes& slopes) const {
    write_gradient(call_, terms_.power, reverse, s_, true, n_, slopes, uniform_slope(), gradient_row(a_, i));
  }

  const CallContext& call_;
  const KdLoss& a_;
  const DivergenceKernels& kernels_;
  int64_t n_;
  Scratch s_;
  float *fourth_, *fifth_;
  Prefetcher prefetcher_;
  Prefetch next_{};
  Terms terms_;                                      // of the row
  double factor_ = 0, ce_slope_ = 0, kl_slope_ = 0;  // of the row
};

}  // namespace kdfast
