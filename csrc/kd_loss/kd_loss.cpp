// Fused cross-entropy and temperature-scaled KL divergence: row losses and their gradient in one pass over the
// operands.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/core.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "kd_loss/dense.h"
#include "kd_loss/long_rows.h"
#include "kd_loss/topk.h"

namespace kdfast {
namespace {

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

// What is wrong with an index of a row that check_rows has found to be out of range.
[[noreturn]] void name_index(const KdLoss& a, int64_t i) {
  const int64_t label = a.labels ? a.labels[i * a.labels_stride] : 0, row = teacher_row(a, i);
  if (label < 0 || label >= a.logits.cols)
    out_of_range("labels[" + std::to_string(i) + "]", label, "the number of classes in logits is", a.logits.cols);
  if (row < 0 || row >= a.teacher.rows)
    out_of_range("rows[" + std::to_string(i) + "]", row, "the number of teacher rows is", a.teacher.rows);
  int64_t j = 0;
  while (a.classes[row * a.teacher.cols + j] >= 0 && a.classes[row * a.teacher.cols + j] < a.logits.cols) ++j;
  out_of_range("teacher.classes[" + std::to_string(row) + ", " + std::to_string(j) + "]",
               a.classes[row * a.teacher.cols + j], "the number of classes in logits is", a.logits.cols);
}

bool has_bad_class(const KdLoss& a, int64_t row) {
  const int32_t* ids = a.classes + row * a.teacher.cols;
  return std::any_of(ids, ids + a.teacher.cols, [&](int32_t id) { return id < 0 || id >= a.logits.cols; });
}

// Sum of the weights of the counted rows. Refuses labels, teacher rows and class ids that are out of range: they are
// indices, and an unchecked one would read outside the tensors.
double check_rows(const KdLoss& a) {
  const int64_t *labels = a.labels, *rows = a.rows;
  // As unsigned numbers, negative indices are too large as well.
  const uint64_t classes = static_cast<uint64_t>(a.logits.cols),
                 teacher_rows = rows ? static_cast<uint64_t>(a.teacher.rows) : 1;
  double total = 0;
  for (int64_t i = 0; i < a.logits.rows; ++i) {
    const int64_t label = labels ? labels[i * a.labels_stride] : 0;
    if (labels && label == a.ignore_index) continue;
    const int64_t row = rows ? rows[i * a.rows_stride] : 0;
    if (static_cast<uint64_t>(label) >= classes || static_cast<uint64_t>(row) >= teacher_rows) name_index(a, i);
    if (a.use_kl && a.classes) {
      fetch_topk(a, i + kFetched);
      if (has_bad_class(a, teacher_row(a, i))) name_index(a, i);
    }
    total += weight_of(a, i);
  }
  return total;
}

// Factor that all rows share: one over the sum of the counted weights for a mean (0 when nothing counts).
double common_factor(const KdLoss& a, double weights) {
  if (a.reduction != kMean) return 1.0;
  return weights == 0 ? 0.0 : 1.0 / weights;
}

// In four chains, whose additions do not wait for each other.
double sum_of(const double* values, int64_t n) {
  double a = 0, b = 0, c = 0, d = 0;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) a += values[i], b += values[i + 1], c += values[i + 2], d += values[i + 3];
  for (; i < n; ++i) a += values[i];
  return (a + b) + (c + d);
}

constexpr int64_t kLine = 8;  // doubles in a cache line

int64_t whole_lines(int64_t doubles) { return (doubles + kLine - 1) / kLine * kLine; }

double* next_line(double* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(double); }

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

// Floats of scratch for a row: full vectors, and one that loading a row may write behind it.
int64_t scratch_size(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes + kLanes; }

}  // namespace

void kd_loss(const KdLoss& a) {
  check_shapes(a);
  const double weights = check_rows(a);
  const int64_t width = scratch_size(a.logits.cols), floats_each = DenseRows::count(width) * 3 * width;
  const int64_t k = a.classes && a.use_kl ? a.teacher.cols : 0;
  const int threads = std::max(a.threads, 1);
  // Losses of the rows; then for each thread floats of dense rows, and the terms of top-k ones. Not cleared: a thread's
  // part stays in its own caches from one call to the next.
  const int64_t rows = whole_lines(a.logits.rows), each = whole_lines(floats_each / 2 + 3 * k);
  const std::unique_ptr<double[]> memory(new double[static_cast<size_t>(rows + threads * each + kLine)]);
  double* losses = next_line(memory.get());
  const Job job{a,
                row_kernels(a.isa_limit),
                power_of(a),
                common_factor(a, weights),
                a.kl_factor / a.temperature,
                a.use_kl ? static_cast<float>(1.0 / a.temperature) : 1.0f,
                losses};
  parallel_rows(a.logits.rows, a.logits.cols + 100, threads, [&](int64_t begin, int64_t end, int slot) {
    double* mine = losses + rows + slot * each;
    float* f = reinterpret_cast<float*>(mine);
    double* d = mine + floats_each / 2;
    const auto each_row = [&](const auto& compute) {
      for (int64_t i = begin; i < end; ++i) counted(a, i) ? compute(i) : put_nothing(job, i);
    };
    if (k > 0) {
      const Scratch scratch{f, f + width, f + 2 * width};
      const TopK terms{d, d + k, d + 2 * k};
      each_row([&](int64_t i) {
        fetch_topk(a, i + kFetched);
        topk_row(job, scratch, terms, i);
      });
    } else if (a.logits.cols >= LongRows::kLeast) {
      LongRows rows_of_blocks(job, f, width);
      each_row([&](int64_t i) { rows_of_blocks.add(i); });
    } else {
      DenseRows whole_rows(job, f, width);
      each_row([&](int64_t i) { whole_rows.add(i); });
      whole_rows.finish();
    }
  });
  if (a.reduction == kNone) {
    for (int64_t i = 0; i < a.logits.rows; ++i) a.loss[i] = static_cast<float>(losses[i]);
    return;
  }
  *a.loss = static_cast<float>(sum_of(losses, a.logits.rows));
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
