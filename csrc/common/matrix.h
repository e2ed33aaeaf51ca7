// A strided matrix of any element type that the operators read.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace kdfast {

// Strides count elements; dtype is a code of dtype.h.
struct Matrix {
  const void* data;
  int64_t rows, cols, row_stride, col_stride;
  int dtype;
};

inline const char* row_address(const Matrix& m, int64_t row) {
  return static_cast<const char*>(m.data) + row * m.row_stride * size_of(m.dtype);
}

inline double element(const Matrix& m, int64_t row, int64_t col) {
  const int64_t at = row * m.row_stride + col * m.col_stride;
  if (m.dtype == kFloat32) return static_cast<double>(static_cast<const float*>(m.data)[at]);
  if (m.dtype == kBFloat16) return static_cast<double>(decode_one(static_cast<const BFloat16*>(m.data) + at));
  return static_cast<double>(decode_one(static_cast<const Float16*>(m.data) + at));
}

}  // namespace kdfast
