// Rows of kd_loss that exceed the L1 and L2 caches, computed one block of classes at a time. The terms of a block are
// relative to the block's own maxima, so that student and teacher are read once.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/simd.h"
#include "kd_loss/dense.h"

namespace kdfast {

// Values that the terms of some classes are relative to.
struct Reference {
  double max_z = -HUGE_VAL, max_t = -HUGE_VAL, origin = -HUGE_VAL;
};

// Converts terms relative to one reference to terms relative to another, whose maxima are at least as large.
class Rescale {
 public:
  Rescale(const KdLoss& a, const Terms& terms, const Reference& from, const Reference& to) : reverse_(a.reverse) {
    const double inverse_t = terms.use_kl ? 1.0 / terms.temperature : 1.0, z = difference(from.max_z, to.max_z);
    e1_ = std::exp(z);
    e_ = std::exp(z * inverse_t);
    if (!terms.use_kl) return;
    const double t = difference(from.max_t, to.max_t);
    u_ = std::exp(t * inverse_t);
    gap_ = (reverse_ ? z - difference(from.origin, to.origin) : t - z) * inverse_t;
  }

  // Sums relative to `to` from sums relative to `from`.
  Sums sums(const Sums& s) const {
    const double mass = reverse_ ? s.e : s.u, factor = reverse_ ? e_ : u_;
    return {product(e1_, s.e1), product(e_, s.e), product(u_, s.u),
            mass == 0 ? 0.0 : product(factor, s.cross + mass * gap_)};
  }

  // Slopes for terms relative to `from` from slopes for terms relative to `to`.
  Slopes slopes(const Slopes& s) const {
    return {static_cast<float>(e1_ * s.e1), static_cast<float>(e_ * s.e), static_cast<float>(u_ * s.u),
            static_cast<float>(s.shift - gap_)};
  }

 private:
  static double difference(double from, double to) { return from == to ? 0.0 : from - to; }

  // f x, but 0 if f is 0 and x is infinite.
  static double product(double f, double x) { return f == 0 && std::isinf(x) ? 0.0 : f * x; }

  bool reverse_;
  double e1_ = 0, e_ = 0, u_ = 0;  // factors of the terms
  double gap_ = 0;                 // added to a - b (forward) or b - a (reverse)
};

class LongRows {
 public:
  static constexpr int64_t kMinClasses = 100000;  // with fewer classes, DenseRows is faster

  // `floats` is scratch of 3 * width floats.
  LongRows(const CallContext& call, float* floats, int64_t width)
      : call_(call), a_(call.args), s_{floats, floats + width, floats + 2 * width}, prefetcher_(call.args, floats) {
    const int64_t least = (a_.logits.cols + kMaxBlocks - 1) / kMaxBlocks;
    size_ = std::max(kMinBlock, round_up(least, kLanes));
  }

  void add(int64_t i) {
    DenseRow row{};
    Terms own;
    row.terms = &call_.terms(i, &own);
    row.index = i;
    row.label = label_of(a_, *row.terms, i);
    sum(&row);
    const double log_ratio = row.terms->use_kl ? std::log(row.sums.e / row.sums.u) : 0.0;
    const double factor = store_row_loss(call_, row, std::log(row.sums.e1), log_ratio) * a_.grad_scale;
    if (a_.grad) store_gradients(row, slopes_of(call_, row, factor), factor);
  }

  void finish() {}

 private:
  static constexpr int64_t kMaxBlocks = 128, kMinBlock = 4096;

  Span span(int64_t block) const { return {block * size_, std::min(size_, a_.logits.cols - block * size_)}; }

  Scratch scratch(int64_t block) const { return {s_.e + block * size_, s_.u + block * size_, s_.e1 + block * size_}; }

  void sum(DenseRow* row) {
    whole_ = {};
    logits_ = {};
    for (int64_t block = 0; block * size_ < a_.logits.cols; ++block) {
      Reference& own = blocks_[block];
      const Sums block_part = sum_block(*row, block, &own);
      const Reference to{std::max(whole_.max_z, own.max_z), std::max(whole_.max_t, own.max_t),
                         own.max_z > whole_.max_z ? own.origin : whole_.origin};
      const Sums before = Rescale(a_, *row->terms, whole_, to).sums(row->sums);
      const Sums added = Rescale(a_, *row->terms, own, to).sums(block_part);
      row->sums = {before.e1 + added.e1, before.e + added.e, before.u + added.u, before.cross + added.cross};
      whole_ = to;
    }
    row->max_z = static_cast<float>(whole_.max_z);
    row->max_t = static_cast<float>(whole_.max_t);
    row->origin = static_cast<float>(whole_.origin);
    row->z_target = row->label < 0 ? 0.0 : element(a_.logits, row->index, row->label) - whole_.max_z;
    if (!is_smoothed(*row)) return;
    row->z_target = expected_logit(a_, row->z_target, {logits_.count, logits_.sum - logits_.count * whole_.max_z});
  }

  bool is_smoothed(const DenseRow& row) const { return row.label >= 0 && a_.label_smoothing > 0; }

  // Returns the sums of a block and their reference.
  Sums sum_block(DenseRow row, int64_t block, Reference* own) {
    row.s = scratch(block);
    load_span(call_, span(block), &row);
    // In a block of masked classes only, every term is 0 relative to any finite number.
    const float max_z = row.max_z, max_t = row.max_t;
    for (float* x : {&row.max_z, &row.max_t, &row.origin}) *x = *x == -kInf ? 0.0f : *x;
    *own = {max_z, max_t, row.origin};
    if (is_smoothed(row)) {
      const Total total = call_.kernels.total(row.z, row.s.e, span(block).size, row.max_z);
      logits_.count += total.count;
      logits_.sum += total.sum + total.count * static_cast<double>(row.max_z);
    }
    sum_span(call_, span(block).size, prefetcher_.for_span(row.index, span(block)), &row);
    return row.sums;
  }

  // Starts with the last block, whose terms are still in the L1 cache.
  void store_gradients(DenseRow row, const Slopes& slopes, double factor) const {
    for (int64_t block = (a_.logits.cols - 1) / size_; block >= 0; --block) {
      row.s = scratch(block);
      store_gradient_span(call_, row, span(block), Rescale(a_, *row.terms, blocks_[block], whole_).slopes(slopes),
                          factor);
    }
  }

  const CallContext& call_;
  const KdLoss& a_;
  Scratch s_;
  Prefetcher prefetcher_;
  int64_t size_;  // classes per block
  Reference blocks_[kMaxBlocks], whole_;
  Total logits_{};  // of the row, not relative to its largest one
};

}  // namespace kdfast
