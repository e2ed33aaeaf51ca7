// Residuals of a softmax head on a CPU, and the norms of its per-sample gradients; softmax_head.h has the formula.
//
// Nothing here subtracts a probability from 1: the residual of the label is minus the sum of the other residuals.
#include "softmax_head/softmax_head.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "softmax_head/lanes.h"

namespace kdfast::softmax_head {
namespace {

template <class T>
const T* end_of(const void* data, int64_t rows, int64_t stride, int64_t cols) {
  return static_cast<const T*>(data) + (rows - 1) * stride + cols;
}

// Writes the residual of one row to `r`, padded with zeros; `e` is scratch.
template <class T, int W>
KDFAST_INLINE void residual_row(const Residuals& a, int64_t row, T* r, T* e) {
  const Logits& h = a.logits;
  const int64_t n = h.classes, padded = round_up(n, kLanes);
  const T* z = static_cast<const T*>(h.data) + row * h.stride;
  if (h.alpha < 1) {
    exponentials<T, W>(z, n, T{1}, r, end_of<T>(h.data, h.rows, h.stride, n));
    const int64_t label = a.labels[row];
    const double own = r[label];
    r[label] = 0;
    const double others = sum_row<T, W>(r, padded);
    const double factor = (1 - h.alpha) / (own + others);
    scale_row<T, W>(r, padded, static_cast<T>(factor));
    r[label] = static_cast<T>(-others * factor);
  } else {
    std::fill(r, r + padded, T{0});
  }
  if (h.alpha == 0) return;
  const T inv_t = static_cast<T>(1 / h.temperature);
  for (int teacher = 0; teacher < 2; ++teacher) {
    const int64_t stride = teacher ? a.teacher_stride : h.stride;
    const void* logits = teacher ? a.teacher : h.data;
    exponentials<T, W>(static_cast<const T*>(logits) + row * stride, n, inv_t, e, end_of<T>(logits, h.rows, stride, n));
    const T factor = static_cast<T>((teacher ? -1 : 1) * h.alpha * h.temperature / sum_row<T, W>(e, padded));
    for (int64_t i = 0; i < padded; i += kLanes)
      store(r + i, load<W>(r + i) + load<W>(e + i) * broadcast<T, W>(factor));
  }
}

template <class T>
struct ComputeResiduals {
  template <int W>
  KDFAST_INLINE static void run(const Residuals& a, int64_t begin, int64_t end) {
    const int64_t n = a.logits.classes, padded = round_up(n, kLanes);
    std::vector<T> scratch(static_cast<size_t>(2 * padded));
    T* r = scratch.data();
    for (int64_t i = begin; i < end; ++i) {
      residual_row<T, W>(a, i, r, r + padded);
      if (a.residuals) std::copy(r, r + n, static_cast<T*>(a.residuals) + i * n);
      if (!a.norms) continue;
      double square = sum_squares<T, W>(r, padded);
      if (a.features) {
        const T* x = static_cast<const T*>(a.features) + i * a.features_stride;
        square *= a.extra + sum_feature_squares<T, W>(x, a.width);
      }
      static_cast<T*>(a.norms)[i] = static_cast<T>(std::sqrt(square));
    }
  }
};

struct Kernels {
  void (*compute[2])(const Residuals&, int64_t, int64_t);  // for float and double
};

template <class Isa>
constexpr Kernels make_kernels() {
  return {{Isa::template run<ComputeResiduals<float>>, Isa::template run<ComputeResiduals<double>>}};
}

constexpr Kernels kKernels[] = KDFAST_FOR_EACH_ISA(make_kernels);

}  // namespace

void check(const Logits& h) {
  if (h.rows < 0 || h.classes < 1) throw std::invalid_argument("a head needs at least one class");
  if (!(h.alpha >= 0 && h.alpha <= 1)) throw std::invalid_argument("alpha must lie in [0, 1]");
  if (!(h.temperature > 0)) throw std::invalid_argument("temperature must be positive");
}

void compute_residuals(const Residuals& args) {
  const Logits& h = args.logits;
  check(h);
  if (h.rows == 0) return;
  if (h.alpha < 1 && !args.labels) throw std::invalid_argument("labels are needed unless alpha is 1");
  if (h.alpha > 0 && !args.teacher) throw std::invalid_argument("a teacher is needed unless alpha is 0");
  for (int64_t i = 0; h.alpha < 1 && i < h.rows; ++i)
    if (args.labels[i] < 0 || args.labels[i] >= h.classes) throw std::invalid_argument("a label is out of range");
  const auto kernel = kKernels[isa_level(h.isa_limit)].compute[h.is_double];
  const int64_t cost = 20 + h.classes * (h.alpha > 0 ? 3 : 1) / 2 + (args.features ? args.width / 8 : 0);
  parallel_rows(h.rows, cost, h.threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace kdfast::softmax_head
