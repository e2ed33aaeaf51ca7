// Vector operations on rows of float or double: exponentials, sums and squares.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/simd.h"
#include "common/simd64.h"

namespace kdfast::softmax_head {

constexpr int64_t kBlock = 1024;  // elements summed in lanes before the lanes are added to a double

template <class T, int W>
using Lanes = std::conditional_t<std::is_same_v<T, float>, Floats<W>, Doubles<W>>;

template <class T, int W>
KDFAST_INLINE Lanes<T, W> broadcast(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return splat<W>(x);
  } else {
    return splat64<W>(x);
  }
}

// Sixteen words of ones, then sixteen of zeros: the words from 16 - count on are a mask of the first `count` lanes.
template <class T>
struct MaskTable {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits bits[2 * kLanes];
  constexpr MaskTable() : bits() {
    for (int i = 0; i < kLanes; ++i) bits[i] = ~Bits{0};
  }
};
template <class T>
constexpr MaskTable<T> kMasks;

// The first `count` lanes of `a` and the other lanes of `b`, also if they are infinite or NaN.
template <class T, int W>
KDFAST_INLINE Lanes<T, W> select_first(int64_t count, const Lanes<T, W>& a, const Lanes<T, W>& b) {
  constexpr int kParts = sizeof(Lanes<T, W>) / (4 * W);
  typedef typename MaskTable<T>::Bits Bits __attribute__((vector_size(4 * W)));
  Lanes<T, W> r;
  for (int k = 0; k < kParts; ++k) {
    Bits mask, x, y;
    std::memcpy(&mask, kMasks<T>.bits + kLanes - count + k * (kLanes / kParts), sizeof mask);
    std::memcpy(&x, &a.part[k], sizeof x);
    std::memcpy(&y, &b.part[k], sizeof y);
    x = (x & mask) | (y & ~mask);
    std::memcpy(&r.part[k], &x, sizeof x);
  }
  return r;
}

// Loads sixteen elements, of which the caller uses the first `count`. Reads beyond those only up to `limit`.
template <class T, int W>
KDFAST_INLINE Lanes<T, W> load_some(const T* p, int64_t count, const T* limit) {
  if (p + kLanes <= limit) return load<W>(p);
  T part[kLanes] = {};
  for (int64_t i = 0; i < count && i < kLanes; ++i) part[i] = p[i];
  return load<W>(part);
}

// Writes exp((z - max z) / T) to `e`, padded with zeros to full vectors. `limit` is the end of the memory that may be
// read.
template <class T, int W>
KDFAST_INLINE void exponentials(const T* z, int64_t n, T inv_t, T* e, const T* limit) {
  const Lanes<T, W> lowest = broadcast<T, W>(-std::numeric_limits<T>::infinity());
  Lanes<T, W> m = lowest;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes<T, W> v = load_some<T, W>(z + i, n - i, limit);
    m = max(i + kLanes <= n ? v : select_first<T, W>(n - i, v, lowest), m);
  }
  const Lanes<T, W> shift = broadcast<T, W>(max_of(m)), scale = broadcast<T, W>(inv_t);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes<T, W> v = exp_nonpositive((load_some<T, W>(z + i, n - i, limit) - shift) * scale);
    store(e + i, i + kLanes <= n ? v : select_first<T, W>(n - i, v, broadcast<T, W>(0)));
  }
}

template <class T, int W>
KDFAST_INLINE double sum_row(const T* p, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    Lanes<T, W> lanes = broadcast<T, W>(0);
    for (int64_t i = begin; i < n && i < begin + kBlock; i += kLanes) lanes = lanes + load<W>(p + i);
    total += sum_of(lanes);
  }
  return total;
}

template <class T, int W>
KDFAST_INLINE void scale_row(T* p, int64_t n, T factor) {
  for (int64_t i = 0; i < n; i += kLanes) store(p + i, load<W>(p + i) * broadcast<T, W>(factor));
}

// Sum of squares, squared in double so that probabilities below the square root of the smallest float count.
template <class T, int W>
KDFAST_INLINE double sum_squares(const T* p, int64_t n) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(p[i + j]) * static_cast<double>(p[i + j]);
  return sum_of(load<W>(lanes));
}

// Sum of squares of features, in lanes of the features' type.
template <class T, int W>
KDFAST_INLINE double sum_feature_squares(const T* p, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    Lanes<T, W> a = broadcast<T, W>(0), b = a;
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const Lanes<T, W> x = load<W>(p + i), y = load<W>(p + i + kLanes);
      a = a + x * x;
      b = b + y * y;
    }
    for (; i < end; i += kLanes) {
      Lanes<T, W> x = load_some<T, W>(p + i, end - i, p + n);
      if (i + kLanes > end) x = select_first<T, W>(end - i, x, broadcast<T, W>(0));
      a = a + x * x;
    }
    total += sum_of(a + b);
  }
  return total;
}

}  // namespace kdfast::softmax_head
