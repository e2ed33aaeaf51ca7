// The vector loops of the per-sample gradient norms, and the scratch they work on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/simd.h"

namespace kdfast {

// Rows of a register tile, and the most vectors in one of them.
constexpr int kTileRows = 8;
constexpr int64_t kTileVectors = 3;
constexpr int64_t kTileWidth = kTileVectors * kLanes;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Floats from one row of a packed matrix to the next: whole vectors, an odd number of them, so that a column's cache
// lines do not all fall into a few sets of the cache.
constexpr int64_t packed_row(int64_t n) { return (round_up(n, kLanes) / kLanes | 1) * kLanes; }

// left[y * row + t * step + i] for rows y and t in [0, count).
struct Walk {
  const float* data;
  int64_t step, row;
};

struct GhostKernels {
  // out (8, 16 vectors), with ld floats a row, (+)= sum over y < rows and t < count of left[i] * right[j].
  void (*multiply)(int vectors, Walk left, Walk right, int64_t rows, int64_t count, float* out, int64_t ld, bool add);
  // sum over s in [begin, end) of weights[s] * (sum over r < count of rows[r][s]); reads up to 15 further elements,
  // where weights must be zero.
  double (*weighted)(const float* const* rows, int count, const float* weights, int64_t begin, int64_t end);
  // Squares of sum over s < size of x[s] * rows[r][s], summed over r < count; reads on as `weighted`, x being zero.
  double (*correlate)(const float* const* rows, int count, const float* x, int64_t size);
  // Sum of squares; size is a multiple of 16.
  double (*square)(const float* x, int64_t size);
};

const GhostKernels& ghost_kernels(int isa_limit);

// to[i] = from[i * step], and `to` steps by to_step.
inline void copy_strided(const float* from, int64_t step, float* to, int64_t count) {
  if (step == 1) {
    std::copy(from, from + count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
  }
}

}  // namespace kdfast
