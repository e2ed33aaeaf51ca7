// Fused cross-entropy and temperature-scaled KL divergence: row losses and their gradient in one pass over the
// operands.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core.h"
#include "kd_dense.h"
#include "kd_topk.h"
#include "parallel.h"
#include "simd.h"

namespace kdfast {
namespace {

constexpr int64_t kAhead = 3;  // rows; more when more are computed together

[[noreturn]] void out_of_range(const std::string& what, int64_t value, const std::string& owner, int64_t size) {
  throw std::out_of_range(what + " is " + std::to_string(value) + ", but " + owner + " " + std::to_string(size) +
                          ": values must lie in [0, " + std::to_string(size) + ")");
}

void check_shapes(const KdLoss& a) {
  check_dtype(a.logits.dtype);
  if (a.logits.rows == 0) return;  // and then addresses may be null
  if (a.logits.cols < 1) throw std::invalid_argument("logits have no classes");
  if (a.use_ce && !a.labels) throw std::invalid_argument("labels are needed unless alpha is 1");
  if (!a.use_kl) return;
  check_dtype(a.teacher.dtype);
  if (!(a.temperature > 0)) throw std::invalid_argument("temperature must be positive");
  if (!a.classes && a.teacher.cols != a.logits.cols)
    throw std::invalid_argument("teacher and logits differ in classes");
  if (a.classes && !a.tail) throw std::invalid_argument("a top-k teacher needs its tail");
  if (!a.rows && a.teacher.rows < a.logits.rows) throw std::invalid_argument("teacher has fewer rows than logits");
}

// Labels, teacher rows and class ids are indices: an unchecked one would read outside the tensors.
void check_indices(const KdLoss& a) {
  for (int64_t i = 0; i < a.logits.rows; ++i) {
    if (!counted(a, i)) continue;
    const int64_t label = a.labels ? a.labels[i * a.labels_stride] : 0;
    if (label < 0 || label >= a.logits.cols)
      out_of_range("labels[" + std::to_string(i) + "]", label, "the number of classes in logits is", a.logits.cols);
    if (!a.use_kl) continue;
    const int64_t row = teacher_row(a, i);
    if (row < 0 || row >= a.teacher.rows)
      out_of_range("rows[" + std::to_string(i) + "]", row, "the number of teacher rows is", a.teacher.rows);
    for (int64_t j = 0; a.classes && j < a.teacher.cols; ++j) {
      const int64_t id = a.classes[row * a.teacher.cols + j];
      if (id < 0 || id >= a.logits.cols)
        out_of_range("teacher.classes[" + std::to_string(row) + ", " + std::to_string(j) + "]", id,
                     "the number of classes in logits is", a.logits.cols);
    }
  }
}

// Factor that all rows share: one over the sum of the counted weights for a mean (0 when nothing counts).
double common_factor(const KdLoss& a) {
  if (a.reduction != kMean) return 1.0;
  double total = 0;
  for (int64_t i = 0; i < a.logits.rows; ++i)
    if (counted(a, i)) total += weight_of(a, i);
  return total == 0 ? 0.0 : 1.0 / total;
}

Power power_of(const KdLoss& a) {
  if (!a.use_ce || !a.use_kl || a.temperature == 1) return kPowerOne;
  return a.temperature == 2 ? kPowerTwo : a.temperature == 4 ? kPowerFour : kPowerAny;
}

// A row without loss and gradient.
void put_nothing(const Job& job, int64_t i) {
  const KdLoss& a = job.args;
  put_loss(job, i, 0, 0, 0);
  if (a.grad) std::memset(gradient_row(a, i), 0, static_cast<size_t>(a.logits.cols * size_of(a.logits.dtype)));
}

// Starts to fetch the head of a teacher's row, which lies anywhere: the hardware sees no pattern in picked rows.
void prefetch_teacher(const KdLoss& a, int64_t i) {
  if (!a.use_kl || !a.rows || i >= a.logits.rows || !counted(a, i)) return;
  constexpr int64_t kLine = 64, kHead = 512;
  const int64_t bytes = a.teacher.cols * size_of(a.teacher.dtype);
  const char* row =
      static_cast<const char*>(a.teacher.data) + teacher_row(a, i) * a.teacher.row_stride * size_of(a.teacher.dtype);
  for (int64_t at = 0; at < std::min(bytes, kHead); at += kLine) __builtin_prefetch(row + at);
}

// Floats of scratch for a row: full vectors, and one that loading a row may write behind it.
int64_t scratch_size(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes + kLanes; }

}  // namespace

void kd_loss(const KdLoss& a) {
  check_shapes(a);
  check_indices(a);
  const int64_t width = scratch_size(a.logits.cols), floats_each = DenseRows::count(width) * 3 * width;
  const int64_t k = a.classes && a.use_kl ? a.teacher.cols : 0;
  const int64_t ahead = std::max(kAhead, DenseRows::count(width));
  const int threads = std::max(a.threads, 1);
  std::vector<double> losses(static_cast<size_t>(a.logits.rows));
  // Not cleared: each thread's part stays in its own caches from one call to the next.
  const std::unique_ptr<float[]> floats(new float[static_cast<size_t>(threads * floats_each)]);
  std::vector<double> terms(static_cast<size_t>(threads * 3 * k));
  const Job job{a,
                row_kernels(a.isa_limit),
                power_of(a),
                common_factor(a),
                a.kl_factor / a.temperature,
                a.use_kl ? static_cast<float>(1.0 / a.temperature) : 1.0f,
                losses.data()};
  parallel_rows(a.logits.rows, a.logits.cols + 100, threads, [&](int64_t begin, int64_t end, int slot) {
    float* f = floats.get() + slot * floats_each;
    double* d = terms.data() + slot * 3 * k;
    DenseRows dense(job, f, width);
    for (int64_t i = begin; i < end; ++i) {
      prefetch_teacher(a, i + ahead);
      if (!counted(a, i)) {
        put_nothing(job, i);
      } else if (k > 0) {
        topk_row(job, {f, f + width, f + 2 * width}, {d, d + k, d + 2 * k}, i);
      } else {
        dense.add(i);
      }
    }
    dense.finish();
  });
  if (a.reduction == kNone) {
    for (int64_t i = 0; i < a.logits.rows; ++i) a.loss[i] = static_cast<float>(losses[static_cast<size_t>(i)]);
    return;
  }
  double total = 0;
  for (const double row : losses) total += row;
  *a.loss = static_cast<float>(total);
}

void scale_rows(const void* grad, void* out, int dtype, int64_t rows, int64_t cols, const float* factor,
                int64_t factor_stride, float scale, int threads) {
  check_dtype(dtype);
  const auto kernel = row_kernels(kWidestIsa).scale[dtype];
  const int64_t bytes = cols * size_of(dtype);
  parallel_rows(rows, cols / 2, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernel(static_cast<const char*>(grad) + i * bytes, static_cast<char*>(out) + i * bytes, cols,
             factor[i * factor_stride] * scale);
  });
}

}  // namespace kdfast
