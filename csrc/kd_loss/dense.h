// Rows of kd_loss against a teacher that has all classes, or against none.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/core.h"
#include "common/dtype.h"
#include "kd_loss/row_loops.h"

namespace kdfast {

// What all rows of one call share.
struct Job {
  const KdLoss& args;
  const RowKernels& kernels;
  Power power;
  double common;      // the factor that all rows have in the reduction
  double soft_slope;  // of the divergence in its exponents: kl_factor / T
  float inverse_t;    // 1 / T, or 1 without a teacher
  double* losses;
};

inline const char* row_of(const Matrix& m, int64_t row) {
  return static_cast<const char*>(m.data) + row * m.row_stride * size_of(m.dtype);
}

inline double element(const Matrix& m, int64_t row, int64_t col) {
  const int64_t at = row * m.row_stride + col * m.col_stride;
  if (m.dtype == kFloat32) return static_cast<double>(static_cast<const float*>(m.data)[at]);
  if (m.dtype == kBFloat16) return static_cast<double>(decode_one(static_cast<const BFloat16*>(m.data) + at));
  return static_cast<double>(decode_one(static_cast<const Float16*>(m.data) + at));
}

// Where classes lie in a row.
struct Span {
  int64_t begin, size;
};

// Classes of a row as contiguous floats: in place where they already are that (but for a partial vector), else copied
// to `buffer`.
inline const float* floats_of(const Job& job, const Matrix& m, int64_t row, Span span, float* buffer, float* largest) {
  const char* base = row_of(m, row) + span.begin * m.col_stride * size_of(m.dtype);
  const bool direct = m.dtype == kFloat32 && m.col_stride == 1;
  *largest = job.kernels.load[m.dtype](base, m.col_stride, span.size, buffer, !direct);
  return direct ? reinterpret_cast<const float*>(base) : buffer;
}

inline bool counted(const KdLoss& a, int64_t i) { return !a.labels || a.labels[i * a.labels_stride] != a.ignore_index; }

inline int64_t label_of(const KdLoss& a, int64_t i) { return a.use_ce ? a.labels[i * a.labels_stride] : -1; }

inline int64_t teacher_row(const KdLoss& a, int64_t i) { return a.rows ? a.rows[i * a.rows_stride] : i; }

inline double weight_of(const KdLoss& a, int64_t i) { return a.weights ? static_cast<double>(a.weights[i]) : 1.0; }

// Stores what a row adds to the result; a term that is not used has no say, even when it is infinite.
inline void put_loss(const Job& job, int64_t i, double factor, double ce, double kl) {
  const KdLoss& a = job.args;
  job.losses[i] = factor * ((a.use_ce ? a.ce_factor * ce : 0.0) + (a.use_kl ? a.kl_factor * kl : 0.0));
  if (a.ce) a.ce[i] = static_cast<float>(ce);
  if (a.kl) a.kl[i] = static_cast<float>(kl);
}

inline char* gradient_row(const KdLoss& a, int64_t i) {
  return static_cast<char*>(a.grad) + i * a.logits.cols * size_of(a.logits.dtype);
}

inline void put_gradient(const KdLoss& a, int64_t i, int64_t column, float value) {
  char* p = gradient_row(a, i) + column * size_of(a.logits.dtype);
  if (a.logits.dtype == kFloat32)
    encode_one(reinterpret_cast<float*>(p), value);
  else if (a.logits.dtype == kBFloat16)
    encode_one(reinterpret_cast<BFloat16*>(p), value);
  else
    encode_one(reinterpret_cast<Float16*>(p), value);
}

// exp(z - max z) of one class, from the kept terms.
inline float hard_term(const Job& job, const Scratch& s, int64_t column) {
  if (job.power == kPowerAny) return s.e1[column];
  float e = s.e[column];
  for (int i = 0; i < job.power; ++i) e *= e;
  return e;
}

// Gradient of one class from the kept terms, which begin with class `begin`, less `onehot`: the label's element is
// rounded to its type only once.
inline void put_label(const Job& job, const Scratch& s, int64_t begin, const Slopes& slopes, int64_t i, int64_t label,
                      float onehot) {
  const KdLoss& a = job.args;
  const int64_t at = label - begin;
  const float e = s.e[at], u = s.u[at];
  const float soft = !a.use_kl    ? 0.0f
                     : !a.reverse ? e * slopes.student - u * slopes.teacher
                     : e == 0.0f  ? 0.0f
                                  : e * slopes.student * (u - slopes.shift);
  put_gradient(a, i, label, hard_term(job, s, at) * slopes.one + soft - onehot);
}

// Says what to fetch while a row is computed: the next rows of student and teacher, if their classes lie side by side
// and the teacher has all of them, and the row's own gradient, if it goes through the caches.
class Fetches {
 public:
  // `nothing`: an address at hand, in place of what is not fetched.
  Fetches(const KdLoss& a, const void* nothing) : a_(a), z_{nothing}, t_{nothing}, grad_{nothing} {
    const int64_t size = size_of(a.logits.dtype), t_size = size_of(a.teacher.dtype);
    if (a.logits.col_stride == 1) z_ = {a.logits.data, a.logits.row_stride * size, size};
    if (a.use_kl && !a.classes && a.teacher.col_stride == 1)
      t_ = {a.teacher.data, a.teacher.row_stride * t_size, t_size};
    if (a.grad && !is_streamed(a.logits.dtype, a.logits.cols)) grad_ = {a.grad, a.logits.cols * size, size};
  }

  // During row i. Moves `next` to the first row that counts from there on.
  Ahead during(int64_t i, int64_t* next) const {
    while (*next < a_.logits.rows && !counted(a_, *next)) ++*next;
    return ahead(*next < a_.logits.rows ? *next : i, 0, i, 0);
  }

  // During some classes of row i: those that follow, of this row or the next.
  Ahead during(int64_t i, Span span) const {
    const int64_t end = span.begin + span.size;
    if (end < a_.logits.cols) return ahead(i, end, i, span.begin);
    const bool more = i + 1 < a_.logits.rows && counted(a_, i + 1);
    return ahead(more ? i + 1 : i, 0, i, span.begin);
  }

 private:
  struct Rows {
    const void* data;
    int64_t stride = 0, size = 0;  // in bytes, of a row and of a class
    const char* at(int64_t row, int64_t column) const {
      return static_cast<const char*>(data) + row * stride + column * size;
    }
  };

  // Logits of a row from a column on, and the gradient of another.
  Ahead ahead(int64_t row, int64_t column, int64_t grad_row, int64_t grad_column) const {
    return {z_.at(row, column), t_.at(teacher_row(a_, row), column), grad_.at(grad_row, grad_column), z_.size, t_.size,
            grad_.size};
  }

  const KdLoss& a_;
  Rows z_, t_, grad_;
};

// First place of a value in a row; n where it is not.
inline int64_t place_of(const float* p, int64_t n, float value) {
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

// Where a reverse divergence's logarithms of the teacher count from: its logit of the student's most probable class. So
// they are small where the student's probability is large, however far the logits spread.
inline float origin_of(const float* z, const float* t, int64_t n, float max_z, float max_t) {
  const int64_t at = place_of(z, n, max_z);
  return at == n || t[at] == -kInf ? max_t : t[at];
}

// A row, or some of its classes.
struct DenseRow {
  int64_t at, label;
  Scratch s;
  const float *z, *t;
  float max_z, max_t, from_t;
  double z_label;  // of the label, relative to max z
  Sums sums;
};

// Takes in classes of row r->at.
inline void load_span(const Job& job, Span span, DenseRow* r) {
  const KdLoss& a = job.args;
  r->z = floats_of(job, a.logits, r->at, span, r->s.e, &r->max_z);
  if (!a.use_kl) return;
  r->t = floats_of(job, a.teacher, teacher_row(a, r->at), span, r->s.u, &r->max_t);
  r->from_t = a.reverse ? origin_of(r->z, r->t, span.size, r->max_z, r->max_t) : r->max_t;
}

inline void sum_span(const Job& job, int64_t size, const Ahead& ahead, DenseRow* r) {
  const KdLoss& a = job.args;
  const bool keep = a.grad != nullptr;
  r->sums = a.use_kl ? job.kernels.pair[a.reverse][job.power](r->z, r->t, size, r->max_z, r->max_t, r->from_t,
                                                              job.inverse_t, keep, r->s, ahead)
                     : job.kernels.student[job.power](r->z, size, r->max_z, job.inverse_t, keep, r->s, ahead);
}

// Puts the row's loss from the logarithms of sums.one and of sums.student / sums.teacher; returns its factor.
inline double put_row_loss(const Job& job, const DenseRow& r, double log_one, double log_ratio) {
  const KdLoss& a = job.args;
  const double ce = r.label < 0 ? 0.0 : log_one - r.z_label;
  double kl = 0;
  if (a.use_kl && a.reverse) {
    const double shift = (static_cast<double>(r.from_t) - static_cast<double>(r.max_t)) / a.temperature;
    kl = r.sums.cross / r.sums.student - (log_ratio + shift);
  } else if (a.use_kl) {
    kl = r.sums.cross / r.sums.teacher + log_ratio;
  }
  const double factor = weight_of(a, r.at) * job.common;
  put_loss(job, r.at, factor, ce, kl);
  return factor;
}

inline Slopes slopes_of(const Job& job, const Sums& sums, double factor) {
  const KdLoss& a = job.args;
  const double hard = a.use_ce ? factor * a.ce_factor : 0.0, soft = a.use_kl ? factor * job.soft_slope : 0.0;
  Slopes slopes;
  slopes.one = static_cast<float>(hard / sums.one);
  slopes.student = static_cast<float>(soft / sums.student);
  if (a.use_kl) slopes.teacher = static_cast<float>(soft / sums.teacher);
  if (a.use_kl && a.reverse) slopes.shift = static_cast<float>(sums.cross / sums.student);
  return slopes;
}

// Writes the gradient of some classes of a row from their kept terms.
inline void put_gradient_span(const Job& job, const DenseRow& r, Span span, const Slopes& slopes, double factor) {
  const KdLoss& a = job.args;
  const bool bend = a.use_kl && a.reverse, stream = is_streamed(a.logits.dtype, a.logits.cols);
  char* out = gradient_row(a, r.at) + span.begin * size_of(a.logits.dtype);
  job.kernels.gradient[bend][job.power][a.logits.dtype](r.s, a.use_kl, span.size, slopes, stream, out);
  if (r.label < span.begin || r.label >= span.begin + span.size) return;
  put_label(job, r.s, span.begin, slopes, r.at, r.label, static_cast<float>(factor * a.ce_factor));
}

// Rows that are computed together: each step is taken for all of them before the next, since the steps of one row wait
// for each other.
class DenseRows {
 public:
  static constexpr int64_t kMost = 8;              // their logarithms fill a vector
  static constexpr int64_t kMostFloats = 1 << 12;  // of scratch, that stay in the nearest cache

  // How many rows of `width` floats of scratch are computed together.
  static int64_t count(int64_t width) { return std::clamp<int64_t>(kMostFloats / (3 * width), 1, kMost); }

  // `floats`: scratch for count(width) rows, 3 * width each.
  DenseRows(const Job& job, float* floats, int64_t width)
      : job_(job), a_(job.args), floats_(floats), width_(width), room_(count(width)), fetches_(job.args, floats) {}

  // Takes a row in; computes the rows taken in when there is no room for more.
  void add(int64_t i) {
    DenseRow& r = rows_[size_];
    float* floats = floats_ + size_ * 3 * width_;
    r.at = i;
    r.label = label_of(a_, i);
    r.s = {floats, floats + width_, floats + 2 * width_};
    load_span(job_, {0, a_.logits.cols}, &r);
    r.z_label = r.label < 0 ? 0.0 : static_cast<double>(r.z[r.label] - r.max_z);
    if (++size_ == room_) finish();
  }

  void finish() {
    double logs[2 * kMost];
    std::fill(logs, logs + 2 * kMost, 1.0);
    int64_t next = size_ ? rows_[size_ - 1].at : 0;
    for (int64_t r = 0; r < size_; ++r) {
      ++next;
      sum_span(job_, a_.logits.cols, fetches_.during(rows_[r].at, &next), &rows_[r]);
      logs[r] = rows_[r].sums.one;
      if (a_.use_kl) logs[kMost + r] = rows_[r].sums.student / rows_[r].sums.teacher;
    }
    job_.kernels.logarithms(logs);
    for (int64_t r = 0; r < size_; ++r) put(rows_[r], logs[r], logs[kMost + r]);
    size_ = 0;
  }

 private:
  void put(const DenseRow& r, double log_one, double log_ratio) const {
    const double factor = put_row_loss(job_, r, log_one, log_ratio) * a_.hold;
    if (a_.grad) put_gradient_span(job_, r, {0, a_.logits.cols}, slopes_of(job_, r.sums, factor), factor);
  }

  const Job& job_;
  const KdLoss& a_;
  float* floats_;
  int64_t width_, room_, size_ = 0;
  Fetches fetches_;
  DenseRow rows_[kMost];
};

}  // namespace kdfast
