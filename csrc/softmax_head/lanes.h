// Vectors of either floating type, parts of rows, and what the rows of a softmax head are made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/simd.h"
#include "common/simd64.h"

namespace kdfast {

constexpr int64_t kBlock = 1024;  // elements whose sums in lanes are added up before they go into a double

template <class T, int W>
using Lanes = std::conditional_t<std::is_same_v<T, float>, Floats<W>, Doubles<W>>;

template <class T, int W>
KDFAST_INLINE Lanes<T, W> all(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return splat<W>(x);
  } else {
    return splat64<W>(x);
  }
}

// Ones in all bits, then zeros: sixteen from 16 - count on are a mask of the first `count` lanes.
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

// Lanes of `a` where they are among the first `count`, else of `b`; whatever the lanes hold.
template <class T, int W>
KDFAST_INLINE Lanes<T, W> first(int64_t count, const Lanes<T, W>& a, const Lanes<T, W>& b) {
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

// Sixteen elements of which the first `count` matter. Reads over them while that is inside `limit`.
template <class T, int W>
KDFAST_INLINE Lanes<T, W> load_some(const T* p, int64_t count, const T* limit) {
  if (p + kLanes <= limit) return load<W>(p);
  T part[kLanes] = {};
  for (int64_t i = 0; i < count && i < kLanes; ++i) part[i] = p[i];
  return load<W>(part);
}

// exp((z - max z) / T) into `e`, padded with zeros to full vectors. `limit` is the end of the memory behind z
// that may be read.
template <class T, int W>
KDFAST_INLINE void exponentials(const T* z, int64_t n, T inv_t, T* e, const T* limit) {
  const Lanes<T, W> lowest = all<T, W>(-std::numeric_limits<T>::infinity());
  Lanes<T, W> m = lowest;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes<T, W> v = load_some<T, W>(z + i, n - i, limit);
    m = max(i + kLanes <= n ? v : first<T, W>(n - i, v, lowest), m);
  }
  const Lanes<T, W> shift = all<T, W>(max_of(m)), scale = all<T, W>(inv_t);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes<T, W> v = exp_nonpositive((load_some<T, W>(z + i, n - i, limit) - shift) * scale);
    store(e + i, i + kLanes <= n ? v : first<T, W>(n - i, v, all<T, W>(0)));
  }
}

template <class T, int W>
KDFAST_INLINE double sum_row(const T* p, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    Lanes<T, W> lanes = all<T, W>(0);
    for (int64_t i = begin; i < n && i < begin + kBlock; i += kLanes) lanes = lanes + load<W>(p + i);
    total += sum_of(lanes);
  }
  return total;
}

template <class T, int W>
KDFAST_INLINE void scale_row(T* p, int64_t n, T factor) {
  for (int64_t i = 0; i < n; i += kLanes) store(p + i, load<W>(p + i) * all<T, W>(factor));
}

// Sum of squares, squared in double: probabilities far below the square root of the smallest float count too.
template <class T, int W>
KDFAST_INLINE double squares(const T* p, int64_t n) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(p[i + j]) * static_cast<double>(p[i + j]);
  return sum_of(load<W>(lanes));
}

// Sum of squares of features, in lanes of their own type.
template <class T, int W>
KDFAST_INLINE double feature_squares(const T* p, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    Lanes<T, W> a = all<T, W>(0), b = a;
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const Lanes<T, W> x = load<W>(p + i), y = load<W>(p + i + kLanes);
      a = a + x * x;
      b = b + y * y;
    }
    for (; i < end; i += kLanes) {
      Lanes<T, W> x = load_some<T, W>(p + i, end - i, p + n);
      if (i + kLanes > end) x = first<T, W>(end - i, x, all<T, W>(0));
      a = a + x * x;
    }
    total += sum_of(a + b);
  }
  return total;
}

}  // namespace kdfast
