// Checks of the operands of kd_loss: one pass over labels, teacher rows and class ids.
#include "kd_loss/validation.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "kd_loss/prefetch.h"

namespace kdfast {
namespace {

[[noreturn]] void raise_out_of_range(const std::string& what, int64_t value, const std::string& owner, int64_t size) {
  throw std::out_of_range("`" + what + "` is " + std::to_string(value) + ", but " + owner + " " + std::to_string(size) +
                          ": values must lie in [0, " + std::to_string(size) + ")");
}

// Names the index of row i that is out of range.
[[noreturn]] void raise_bad_index(const KdLoss& a, int64_t i) {
  const int64_t label = a.labels ? a.labels[i * a.labels_stride] : 0, row = teacher_row(a, i);
  if (label < 0 || label >= a.logits.cols) {
    raise_out_of_range("labels[" + std::to_string(i) + "]", label, "the number of classes in `logits` is",
                       a.logits.cols);
  }
  if (row < 0 || row >= a.teacher.rows)
    raise_out_of_range("rows[" + std::to_string(i) + "]", row, "the number of rows of `teacher` is", a.teacher.rows);
  int64_t j = 0;
  while (a.classes[row * a.teacher.cols + j] >= 0 && a.classes[row * a.teacher.cols + j] < a.logits.cols) ++j;
  raise_out_of_range("teacher.classes[" + std::to_string(row) + ", " + std::to_string(j) + "]",
                     a.classes[row * a.teacher.cols + j], "the number of classes in `logits` is", a.logits.cols);
}

// Names the number of row i that is out of range.
[[noreturn]] void raise_bad_number(const char* name, int64_t i, double value, const char* range) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  throw std::invalid_argument("`" + std::string(name) + "[" + std::to_string(i) + "]` is " + text + ": must be " +
                              range);
}

void check_numbers(const KdLoss& a, int64_t i) {
  if (a.alphas && !(a.alphas[i] >= 0 && a.alphas[i] <= 1))
    raise_bad_number("alpha", i, a.alphas[i], "in [0, 1], the weight of the divergence");
  if (a.temperatures && !(a.temperatures[i] >= 1e-15 && a.temperatures[i] <= 1e15))
    raise_bad_number("temperature", i, a.temperatures[i], "a positive number, from 1e-15 to 1e+15");
}

bool has_bad_class(const KdLoss& a, int64_t row) {
  const int32_t* ids = a.classes + row * a.teacher.cols;
  return std::any_of(ids, ids + a.teacher.cols, [&](int32_t id) { return id < 0 || id >= a.logits.cols; });
}

}  // namespace

void check_shapes(const KdLoss& a) {
  check_dtype(a.logits.dtype);
  if (a.logits.rows == 0) return;  // addresses may be null
  if (a.logits.cols < 1) throw std::invalid_argument("`logits` have no classes");
  const bool needs_labels = a.use_ce || (a.use_kl && a.divergence == kDecoupled);
  if (needs_labels && !a.labels) throw std::invalid_argument("`labels` are needed unless `alpha` is 1");
  if (!a.use_kl) return;
  check_dtype(a.teacher.dtype);
  if (!(a.temperature > 0)) throw std::invalid_argument("`temperature` must be positive");
  if (!a.classes && a.teacher.cols != a.logits.cols)
    throw std::invalid_argument("`teacher` and `logits` differ in classes");
  if (a.classes && a.divergence != kKl)
    throw std::invalid_argument("the divergence needs a `teacher` with all classes");
  if (a.classes && !a.tail) throw std::invalid_argument("a top-k `teacher` needs its tail");
  if (!a.rows && a.teacher.rows < a.logits.rows) throw std::invalid_argument("`teacher` has fewer rows than `logits`");
}

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
    if (static_cast<uint64_t>(label) >= classes || static_cast<uint64_t>(row) >= teacher_rows) raise_bad_index(a, i);
    if (a.alphas || a.temperatures) check_numbers(a, i);
    if (a.classes && reads_teacher(a, i)) {
      prefetch_topk(a, i + kTopKDistance);
      if (has_bad_class(a, teacher_row(a, i))) raise_bad_index(a, i);
    }
    total += weight_of(a, i);
  }
  return total;
}

void raise_repeated_class(const KdLoss& a, int64_t i) {
  const int64_t k = a.teacher.cols, row = teacher_row(a, i);
  const int32_t* ids = a.classes + row * k;
  const auto is_kept = [&](int64_t j) { return element(a.teacher, row, j) != -HUGE_VAL; };
  const auto repeats = [&](int64_t j) {
    for (int64_t before = 0; before < j; ++before)
      if (ids[before] == ids[j] && is_kept(before) && is_kept(j)) return true;
    return false;
  };
  int64_t j = 1;
  while (j + 1 < k && !repeats(j)) ++j;
  throw std::invalid_argument("`teacher.classes[" + std::to_string(row) + "]` holds class " + std::to_string(ids[j]) +
                              " twice: pass each class of a row once, and -inf as the value of entries to leave out");
}

}  // namespace kdfast
