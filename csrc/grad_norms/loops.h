// The vector loops of the per-sample gradient norms.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd.h"

namespace kdfast::grad_norms {

// Rows of a register tile, and its maximal width.
constexpr int kTileRows = 8;
constexpr int64_t kTileVectors = 3;
constexpr int64_t kTileWidth = kTileVectors * kLanes;

// Floats from one row of a packed matrix to the next: an odd number of vectors, so that the cache lines of a column are
// spread over the sets of the cache.
constexpr int64_t packed_stride(int64_t n) { return (round_up(n, kLanes) / kLanes | 1) * kLanes; }

// Element i at position (y, t) is data[y * row + t * step + i].
struct Panel {
  const float* data;
  int64_t step, row;
};

struct VectorLoops {
  // out (8, 16 vectors), with a row stride of ld floats, is set to, or with `add` increased by, the sum over y < rows
  // and t < count of left[i] * right[j].
  void (*multiply)(int vectors, Panel left, Panel right, int64_t rows, int64_t count, float* out, int64_t ld, bool add);
  // Sum over s in [begin, end) of weights[s] * (sum over r < count of rows[r][s]). Reads up to 15 more elements, for
  // which the weights must be zero.
  double (*weighted_sum)(const float* const* rows, int count, const float* weights, int64_t begin, int64_t end);
  // Sum over r < count of (sum over s < size of x[s] * rows[r][s])^2. Reads up to 15 more elements, for which x must be
  // zero.
  double (*squared_dots)(const float* const* rows, int count, const float* x, int64_t size);
  // out[r] = sum over s < size of x[s] * rows[r][s], for r < count. Reads up to 15 more elements, likewise.
  void (*dots)(const float* const* rows, int count, const float* x, int64_t size, double* out);
  // Sum of squares; size is a multiple of 16.
  double (*sum_of_squares)(const float* x, int64_t size);
  // Sum of weights[i] * x[i]^2; size is a multiple of 64.
  double (*weighted_squares)(const float* x, const float* weights, int64_t size);
  // sums[i] += x[i]^2; size is a multiple of 16.
  void (*add_squares)(const float* x, float* sums, int64_t size);
};

const VectorLoops& vector_loops(int isa_limit);

// to[i] = from[i * step].
inline void copy_strided(const float* from, int64_t step, float* to, int64_t count) {
  if (step == 1) {
    std::copy(from, from + count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
  }
}

}  // namespace kdfast::grad_norms
