// Small matrix products in float for x86-64-v4: the result of a block stays in registers.
#pragma once

#include <cstdint>

#include "common/simd.h"

#ifdef KDFAST_X86

namespace kdfast::softmax_head {

constexpr int W = kLanes;
using Vector = Floats<W>;

constexpr int kMaxColumns = 4;  // registers per row of a block of products

// One element in all lanes. Assembly, because GCC would keep copies of it in registers.
KDFAST_INLINE Vector repeated(const float* p) {
#ifdef __clang__
  return splat<W>(*p);
#else
  Vector v;
  __asm__("vbroadcastss %1, %0" : "=v"(v.part[0]) : "m"(*p));
  return v;
#endif
}

// c += a b for c (kRows, kColumns vectors), a (kRows, depth) and b (depth, kColumns vectors), each with a row stride.
// All of c stays in registers.
template <int kRows, int kColumns>
KDFAST_INLINE void add_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                             float* c, int64_t c_stride) {
  Vector sums[kRows][kColumns];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) sums[i][j] = load<W>(c + i * c_stride + j * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[kColumns];
    for (int j = 0; j < kColumns; ++j) row[j] = load<W>(b + k * b_stride + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Vector x = repeated(a + i * a_stride + k);
      for (int j = 0; j < kColumns; ++j) sums[i][j] = fma(x, row[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) store(c + i * c_stride + j * kLanes, sums[i][j]);
}

// The same for any number of rows.
template <int kColumns>
KDFAST_INLINE void add_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
                            int64_t c_stride, int64_t rows) {
  constexpr int kRows = kColumns == kMaxColumns ? 6 : 8;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    add_block<kRows, kColumns>(a + i * a_stride, a_stride, b, b_stride, depth, c + i * c_stride, c_stride);
  if (i + 4 <= rows) {
    add_block<4, kColumns>(a + i * a_stride, a_stride, b, b_stride, depth, c + i * c_stride, c_stride);
    i += 4;
  }
  for (; i < rows; ++i)
    add_block<1, kColumns>(a + i * a_stride, a_stride, b, b_stride, depth, c + i * c_stride, c_stride);
}

// The same for any number of rows and up to kMaxColumns vectors.
KDFAST_INLINE void add_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                               float* c, int64_t c_stride, int64_t rows, int64_t columns) {
  switch (columns) {
    case 1:
      return add_rows<1>(a, a_stride, b, b_stride, depth, c, c_stride, rows);
    case 2:
      return add_rows<2>(a, a_stride, b, b_stride, depth, c, c_stride, rows);
    case 3:
      return add_rows<3>(a, a_stride, b, b_stride, depth, c, c_stride, rows);
    default:
      return add_rows<4>(a, a_stride, b, b_stride, depth, c, c_stride, rows);
  }
}

// c += a b^T for c (kRows, kColumns), a (kRows, depth) and b (kColumns, depth). The sums cross lanes.
template <int kRows, int kColumns>
KDFAST_INLINE void add_dots(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
                            int64_t c_stride) {
  Vector sums[kRows][kColumns];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) sums[i][j] = splat<W>(0);
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vector other[kColumns];
    for (int j = 0; j < kColumns; ++j) other[j] = load<W>(b + j * b_stride + k);
    for (int i = 0; i < kRows; ++i) {
      const Vector x = load<W>(a + i * a_stride + k);
      for (int j = 0; j < kColumns; ++j) sums[i][j] = fma(x, other[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) {
      double sum = sum_of(sums[i][j]);
      for (int64_t l = k; l < depth; ++l)
        sum += static_cast<double>(a[i * a_stride + l]) * static_cast<double>(b[j * b_stride + l]);
      c[i * c_stride + j] += static_cast<float>(sum);
    }
}

// The same for any number of rows and columns.
KDFAST_INLINE void add_all_dots(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                                float* c, int64_t c_stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows;) {
    const bool many = i + 4 <= rows;
    const float* from = a + i * a_stride;
    float* to = c + i * c_stride;
    int64_t j = 0;
    for (; many && j + 4 <= columns; j += 4)
      add_dots<4, 4>(from, a_stride, b + j * b_stride, b_stride, depth, to + j, c_stride);
    for (; many && j < columns; ++j)
      add_dots<4, 1>(from, a_stride, b + j * b_stride, b_stride, depth, to + j, c_stride);
    for (; j < columns; ++j) add_dots<1, 1>(from, a_stride, b + j * b_stride, b_stride, depth, to + j, c_stride);
    i += many ? 4 : 1;
  }
}

}  // namespace kdfast::softmax_head

#endif
