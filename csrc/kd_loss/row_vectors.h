// Parts shared by the vector loops over one row of logits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/simd.h"
#include "kd_loss/row_loops.h"

namespace kdfast {

constexpr int64_t kBlock = 1024;  // elements summed in float lanes before the lanes are added to a double

// Loads a full vector from the row itself, but the partial one from the scratch in which loading the row padded it.
template <int W>
KDFAST_INLINE Floats<W> load_padded(const float* p, const float* scratch, int64_t i, int64_t n) {
  return load<W>((i + kLanes <= n ? p : scratch) + i);
}

// x where d is not masked, else 0.
template <int W>
KDFAST_INLINE Floats<W> where_kept(Floats<W> d, Floats<W> x) {
  return where_less(splat<W>(-kInf), d, x, splat<W>(0));
}

// Prefetches the classes from i on.
KDFAST_INLINE void prefetch_at(const Prefetch& p, int64_t i) {
  __builtin_prefetch(p.z + i * p.z_size);
  __builtin_prefetch(p.t + i * p.t_size);
  __builtin_prefetch(p.grad + i * p.grad_size, 1);
}

// Writes n elements, vectors of which are row.at<W>(i); with `around`, floats bypass the caches.
template <int W, class T, class Row>
KDFAST_INLINE void write_row(const Row& row, int64_t n, bool around, T* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (around && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
      for (; i + kLanes <= n; i += kLanes) stream(out + i, row.template at<W>(i));
      stream_fence();
    }
  }
  for (; i + kLanes <= n; i += kLanes) encode(out + i, row.template at<W>(i));
  if (i == n) return;
  if (n >= kLanes) {
    // Writing the last 16 elements, some of them twice, is cheaper than writing a partial vector.
    encode(out + n - kLanes, row.template at<W>(n - kLanes));
  } else {
    encode_part(out, row.template at<W>(0), n);
  }
}

}  // namespace kdfast
