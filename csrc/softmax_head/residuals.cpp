// Residuals of a softmax head on a CPU, and their norms.
//
// Nothing here subtracts a probability from 1: a confident row's own residual is minus the sum of the others'.
#include "softmax_head/softmax_head.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "softmax_head/lanes.h"

namespace kdfast {
namespace {

template <class T>
const T* end_of(const void* data, int64_t rows, int64_t stride, int64_t cols) {
  return static_cast<const T*>(data) + (rows - 1) * stride + cols;
}

// Residual of one row into `r`, padded with zeros; `e` is scratch.
template <class T, int W>
KDFAST_INLINE void residual_row(const HeadResiduals& a, int64_t row, T* r, T* e) {
  const HeadLogits& h = a.head;
  const int64_t n = h.classes, padded = (n + kLanes - 1) / kLanes * kLanes;
  const T* z = static_cast<const T*>(h.logits) + row * h.stride;
  if (h.alpha < 1) {
    exponentials<T, W>(z, n, T{1}, r, end_of<T>(h.logits, h.rows, h.stride, n));
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
    const void* logits = teacher ? a.teacher : h.logits;
    exponentials<T, W>(static_cast<const T*>(logits) + row * stride, n, inv_t, e, end_of<T>(logits, h.rows, stride, n));
    const T factor = static_cast<T>((teacher ? -1 : 1) * h.alpha * h.temperature / sum_row<T, W>(e, padded));
    for (int64_t i = 0; i < padded; i += kLanes) store(r + i, load<W>(r + i) + load<W>(e + i) * all<T, W>(factor));
  }
}

template <class T, int W>
KDFAST_INLINE void residual_rows(const HeadResiduals& a, int64_t begin, int64_t end) {
  const int64_t n = a.head.classes, padded = (n + kLanes - 1) / kLanes * kLanes;
  std::vector<T> scratch(static_cast<size_t>(2 * padded));
  T* r = scratch.data();
  for (int64_t i = begin; i < end; ++i) {
    residual_row<T, W>(a, i, r, r + padded);
    if (a.residuals) std::copy(r, r + n, static_cast<T*>(a.residuals) + i * n);
    if (!a.norms) continue;
    double square = squares<T, W>(r, padded);
    if (a.features)
      square *= a.extra + feature_squares<T, W>(static_cast<const T*>(a.features) + i * a.features_stride, a.width);
    static_cast<T*>(a.norms)[i] = static_cast<T>(std::sqrt(square));
  }
}

#define KDFAST_HEAD(suffix, width, attribute)                                                 \
  template <class T>                                                                          \
  attribute void residual_rows_##suffix(const HeadResiduals& a, int64_t begin, int64_t end) { \
    residual_rows<T, width>(a, begin, end);                                                   \
  }
KDFAST_FOR_EACH_ISA(KDFAST_HEAD)
#undef KDFAST_HEAD

#define KDFAST_HEAD_TABLE(suffix, width, attribute) \
  const auto residuals_##suffix = std::array{residual_rows_##suffix<float>, residual_rows_##suffix<double>};
KDFAST_FOR_EACH_ISA(KDFAST_HEAD_TABLE)
#undef KDFAST_HEAD_TABLE

}  // namespace

void check_head(const HeadLogits& h) {
  if (h.rows < 0 || h.classes < 1) throw std::invalid_argument("a head needs at least one class");
  if (!(h.alpha >= 0 && h.alpha <= 1)) throw std::invalid_argument("alpha must lie in [0, 1]");
  if (!(h.temperature > 0)) throw std::invalid_argument("temperature must be positive");
}

void head_residuals(const HeadResiduals& args) {
  const HeadLogits& h = args.head;
  check_head(h);
  if (h.rows == 0) return;
  if (h.alpha < 1 && !args.labels) throw std::invalid_argument("labels are needed unless alpha is 1");
  if (h.alpha > 0 && !args.teacher) throw std::invalid_argument("a teacher is needed unless alpha is 0");
  for (int64_t i = 0; h.alpha < 1 && i < h.rows; ++i)
    if (args.labels[i] < 0 || args.labels[i] >= h.classes) throw std::invalid_argument("a label is out of range");
  const int level = isa_level(h.isa_limit);
  const auto kernel = KDFAST_PICK_ISA(level, residuals)[h.wide];
  const int64_t cost = 20 + h.classes * (h.alpha > 0 ? 3 : 1) / 2 + (args.features ? args.width / 8 : 0);
  parallel_rows(h.rows, cost, h.threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace kdfast
