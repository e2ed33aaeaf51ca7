// Rows of kd_loss that outgrow the nearest caches: taken a block of classes at a time, whose terms are relative to the
// block's own largest elements, so that student and teacher are read once.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/simd.h"
#include "kd_loss/dense.h"

namespace kdfast {

// What the terms of some classes are relative to: their largest elements, and where a reverse divergence counts from.
struct Origin {
  double z = -HUGE_VAL, t = -HUGE_VAL, from_t = -HUGE_VAL;
};

// From terms that are relative to one origin to terms relative to another, whose largest elements are no smaller.
class Move {
 public:
  Move(const KdLoss& a, const Origin& from, const Origin& to) : reverse_(a.reverse) {
    const double inverse_t = a.use_kl ? 1.0 / a.temperature : 1.0, z = distance(from.z, to.z);
    one_ = std::exp(z);
    student_ = std::exp(z * inverse_t);
    if (!a.use_kl) return;
    const double t = distance(from.t, to.t);
    teacher_ = std::exp(t * inverse_t);
    shift_ = (reverse_ ? z - distance(from.from_t, to.from_t) : t - z) * inverse_t;
  }

  // Sums relative to `to`.
  Sums sums(const Sums& s) const {
    const double mass = reverse_ ? s.student : s.teacher, factor = reverse_ ? student_ : teacher_;
    return {share(one_, s.one), share(student_, s.student), share(teacher_, s.teacher),
            mass == 0 ? 0.0 : share(factor, s.cross + mass * shift_)};
  }

  // Slopes for terms relative to `from`, out of those for terms relative to `to`.
  Slopes slopes(const Slopes& s) const {
    return {static_cast<float>(one_ * s.one), static_cast<float>(student_ * s.student),
            static_cast<float>(teacher_ * s.teacher), static_cast<float>(s.shift - shift_)};
  }

 private:
  static double distance(double from, double to) { return from == to ? 0.0 : from - to; }

  // f x, but 0 where f is and x is infinite.
  static double share(double f, double x) { return f == 0 && std::isinf(x) ? 0.0 : f * x; }

  bool reverse_;
  double one_ = 0, student_ = 0, teacher_ = 0, shift_ = 0;
};

class LongRows {
 public:
  static constexpr int64_t kLeast = 100000;  // classes from which on this is faster than DenseRows

  // `floats`: scratch, 3 * width.
  LongRows(const Job& job, float* floats, int64_t width)
      : job_(job), a_(job.args), s_{floats, floats + width, floats + 2 * width}, fetches_(job.args, floats) {
    const int64_t least = (a_.logits.cols + kMostBlocks - 1) / kMostBlocks;
    size_ = std::max(kLeastBlock, (least + kLanes - 1) / kLanes * kLanes);
  }

  void add(int64_t i) {
    DenseRow row{};
    row.at = i;
    row.label = label_of(a_, i);
    sum(&row);
    const double log_ratio = a_.use_kl ? std::log(row.sums.student / row.sums.teacher) : 0.0;
    const double factor = put_row_loss(job_, row, std::log(row.sums.one), log_ratio) * a_.hold;
    if (a_.grad) put_gradient(row, slopes_of(job_, row.sums, factor), factor);
  }

 private:
  static constexpr int64_t kMostBlocks = 128, kLeastBlock = 4096;

  Span span(int64_t block) const { return {block * size_, std::min(size_, a_.logits.cols - block * size_)}; }

  Scratch scratch(int64_t block) const { return {s_.e + block * size_, s_.u + block * size_, s_.e1 + block * size_}; }

  void sum(DenseRow* row) {
    whole_ = {};
    for (int64_t block = 0; block * size_ < a_.logits.cols; ++block) {
      Origin& own = origins_[block];
      const Sums part = block_sums(*row, block, &own);
      const Origin to{std::max(whole_.z, own.z), std::max(whole_.t, own.t),
                      own.z > whole_.z ? own.from_t : whole_.from_t};
      const Sums before = Move(a_, whole_, to).sums(row->sums), added = Move(a_, own, to).sums(part);
      row->sums = {before.one + added.one, before.student + added.student, before.teacher + added.teacher,
                   before.cross + added.cross};
      whole_ = to;
    }
    row->max_z = static_cast<float>(whole_.z);
    row->max_t = static_cast<float>(whole_.t);
    row->from_t = static_cast<float>(whole_.from_t);
    row->z_label = row->label < 0 ? 0.0 : element(a_.logits, row->at, row->label) - whole_.z;
  }

  // Sums of a block and what they are relative to.
  Sums block_sums(DenseRow row, int64_t block, Origin* own) const {
    row.s = scratch(block);
    load_span(job_, span(block), &row);
    // Masked classes have no terms, whatever they are relative to.
    const float max_z = row.max_z, max_t = row.max_t;
    for (float* x : {&row.max_z, &row.max_t, &row.from_t}) *x = *x == -kInf ? 0.0f : *x;
    *own = {max_z, max_t, row.from_t};
    sum_span(job_, span(block).size, fetches_.during(row.at, span(block)), &row);
    return row.sums;
  }

  // From the block whose terms were computed last, and lie nearest.
  void put_gradient(DenseRow row, const Slopes& slopes, double factor) const {
    for (int64_t block = (a_.logits.cols - 1) / size_; block >= 0; --block) {
      row.s = scratch(block);
      put_gradient_span(job_, row, span(block), Move(a_, origins_[block], whole_).slopes(slopes), factor);
    }
  }

  const Job& job_;
  const KdLoss& a_;
  Scratch s_;
  Fetches fetches_;
  int64_t size_;  // of a block, in classes
  Origin origins_[kMostBlocks], whole_;
};

}  // namespace kdfast
