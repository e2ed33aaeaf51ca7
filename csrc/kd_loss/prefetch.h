// Memory that is prefetched while a row of kd_loss is computed.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "kd_loss/call_context.h"

namespace kdfast {

// Selects the next rows of student and teacher, if their classes are contiguous and the teacher has all of them, and
// the current row of the gradient, if it is written through the caches.
class Prefetcher {
 public:
  // `fallback` is a valid address, used for operands that are not prefetched.
  Prefetcher(const KdLoss& a, const void* fallback) : a_(a), z_{fallback}, t_{fallback}, grad_{fallback} {
    const int64_t size = size_of(a.logits.dtype), t_size = size_of(a.teacher.dtype);
    if (a.logits.col_stride == 1) z_ = {a.logits.data, a.logits.row_stride * size, size};
    if (a.use_kl && !a.classes && a.teacher.col_stride == 1)
      t_ = {a.teacher.data, a.teacher.row_stride * t_size, t_size};
    if (a.grad && !is_streamed(a.logits.dtype, a.logits.cols)) grad_ = {a.grad, a.logits.cols * size, size};
  }

  // For row i. Advances `next` to the first counted row at or after it.
  Prefetch for_row(int64_t i, int64_t* next) const {
    while (*next < a_.logits.rows && !is_counted(a_, *next)) ++*next;
    return prefetch(*next < a_.logits.rows ? *next : i, 0, i, 0);
  }

  // For some classes of row i: the classes after them, in this row or the next.
  Prefetch for_span(int64_t i, Span span) const {
    const int64_t end = span.begin + span.size;
    if (end < a_.logits.cols) return prefetch(i, end, i, span.begin);
    const bool more = i + 1 < a_.logits.rows && is_counted(a_, i + 1);
    return prefetch(more ? i + 1 : i, 0, i, span.begin);
  }

 private:
  struct Rows {
    const void* data;
    int64_t stride = 0, size = 0;  // bytes per row and per class
    const char* at(int64_t row, int64_t column) const {
      return static_cast<const char*>(data) + row * stride + column * size;
    }
  };

  Prefetch prefetch(int64_t row, int64_t column, int64_t grad_row, int64_t grad_column) const {
    return {z_.at(row, column), t_.at(teacher_row(a_, row), column), grad_.at(grad_row, grad_column), z_.size, t_.size,
            grad_.size};
  }

  const KdLoss& a_;
  Rows z_, t_, grad_;
};

constexpr int64_t kTopKDistance = 4;  // rows between the current row and the prefetched row of a top-k teacher

// Prefetches row i of a top-k teacher, which is at an arbitrary address and too short for the hardware's prefetcher.
// Always inlined: GCC drops calls of a function that does nothing but prefetch.
KDFAST_INLINE void prefetch_topk(const KdLoss& a, int64_t i) {
  if (i >= a.logits.rows) return;
  const int64_t row = teacher_row(a, i), k = a.teacher.cols;
  if (row < 0 || row >= a.teacher.rows) return;  // of an ignored row, or not checked yet
  const char *values = row_address(a.teacher, row), *ids = reinterpret_cast<const char*>(a.classes + row * k);
  __builtin_prefetch(a.tail + row);
  for (int64_t at = 0; at < k * size_of(a.teacher.dtype); at += 64) __builtin_prefetch(values + at);
  for (int64_t at = 0; at < k * 4; at += 64) __builtin_prefetch(ids + at);
}

}  // namespace kdfast
