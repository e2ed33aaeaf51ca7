// Fused cross-entropy and temperature-scaled KL divergence: the row losses and their gradient in one pass over the
// operands. Rows are computed by DenseRows or LongRows (teacher with all classes, or none), by compute_topk_row, or by
// DivergenceRows (divergences other than KL).
#include "kd_loss/kd_loss.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "common/parallel.h"
#include "kd_loss/dense.h"
#include "kd_loss/divergences.h"
#include "kd_loss/long_rows.h"
#include "kd_loss/topk.h"
#include "kd_loss/validation.h"

namespace kdfast {
namespace {

constexpr int64_t kLine = 8;  // doubles in a cache line

int64_t round_up_to_line(int64_t doubles) { return round_up(doubles, kLine); }

double* next_line(double* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(double); }

// Memory of one call: the losses of all rows, then for each thread the floats of its rows and the doubles of a top-k
// row. Not cleared: a thread's part stays in its own caches from one call to the next.
class Workspace {
 public:
  explicit Workspace(const KdLoss& a)
      : width_(round_up(a.logits.cols, kLanes) + kLanes),
        floats_((a.use_kl && a.divergence != kKl ? DivergenceRows::kArrays : DenseRows::capacity(width_) * 3) * width_),
        k_(a.classes && a.use_kl ? a.teacher.cols : 0),
        rows_(round_up_to_line(a.logits.rows)),
        per_thread_(round_up_to_line(floats_ / 2 + 3 * k_ + (k_ + 1) / 2)),
        memory_(new double[static_cast<size_t>(rows_ + std::max(a.threads, 1) * per_thread_ + kLine)]),
        losses_(next_line(memory_.get())) {}

  // Floats per term of a row: full vectors, and one more that loading a row may write.
  int64_t width() const { return width_; }
  // Classes of a top-k teacher; 0 for any other.
  int64_t k() const { return k_; }
  double* losses() const { return losses_; }
  float* floats(int slot) const { return reinterpret_cast<float*>(losses_ + rows_ + slot * per_thread_); }
  double* doubles(int slot) const { return losses_ + rows_ + slot * per_thread_ + floats_ / 2; }

 private:
  int64_t width_, floats_, k_, rows_, per_thread_;
  std::unique_ptr<double[]> memory_;
  double* losses_;
};

// Factor common to all rows: for a mean, one over the sum of the weights of non-ignored rows (0 if there are none).
double reduction_factor(const KdLoss& a, double weights) {
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

void write_zero_row(const CallContext& call, int64_t i) {
  const KdLoss& a = call.args;
  store_loss(call, call.common, i, 0, 0, 0);
  if (a.grad) std::memset(gradient_row(a, i), 0, static_cast<size_t>(a.logits.cols * size_of(a.logits.dtype)));
}

// Computes rows [begin, end) with the scratch of one thread. Rows without a divergence, and those of KL to a teacher
// that has all classes, are PlainRows.
template <class PlainRows>
void compute_rows(const CallContext& call, const Workspace& memory, int64_t begin, int64_t end, int slot) {
  const KdLoss& a = call.args;
  const int64_t width = memory.width(), k = memory.k();
  float* f = memory.floats(slot);
  PlainRows plain(call, f, width);
  // A row without a divergence is finished before the next one uses the scratch.
  const auto for_each_row = [&](const auto& compute) {
    for (int64_t i = begin; i < end; ++i) {
      if (!is_counted(a, i))
        write_zero_row(call, i);
      else if (reads_teacher(a, i))
        compute(i);
      else
        plain.add(i), plain.finish();
    }
  };
  if (k > 0) {
    double* d = memory.doubles(slot);
    const Scratch scratch{f, f + width, f + 2 * width};
    const TopKScratch topk{d, d + k, d + 2 * k, reinterpret_cast<int32_t*>(d + 3 * k)};
    for_each_row([&](int64_t i) {
      prefetch_topk(a, i + kTopKDistance);
      compute_topk_row(call, scratch, topk, i);
    });
  } else if (a.use_kl && a.divergence != kKl) {
    DivergenceRows rows(call, f, width);
    for_each_row([&](int64_t i) { rows.add(i); });
  } else {
    for (int64_t i = begin; i < end; ++i) is_counted(a, i) ? plain.add(i) : write_zero_row(call, i);
    plain.finish();
  }
}

}  // namespace

void kd_loss(const KdLoss& a) {
  check_shapes(a);
  const double weights = check_rows(a);
  const Workspace memory(a);
  const double class_target = a.logits.cols == 0 ? 0.0 : a.label_smoothing / static_cast<double>(a.logits.cols);
  std::atomic<int64_t> repeated_row{-1};
  const CallContext call{a,
                         row_kernels(a.isa_limit),
                         make_terms(a.use_ce, a.use_kl, a.ce_factor, a.kl_factor, a.temperature),
                         reduction_factor(a, weights),
                         class_target,
                         1 - a.label_smoothing + class_target,
                         memory.losses(),
                         repeated_row};
  const auto compute = a.logits.cols >= LongRows::kMinClasses ? compute_rows<LongRows> : compute_rows<DenseRows>;
  // About a nanosecond per class, and 100 per row.
  parallel_rows(a.logits.rows, a.logits.cols + 100, std::max(a.threads, 1),
                [&](int64_t begin, int64_t end, int slot) { compute(call, memory, begin, end, slot); });
  if (repeated_row >= 0) raise_repeated_class(a, repeated_row);
  const double* losses = memory.losses();
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
