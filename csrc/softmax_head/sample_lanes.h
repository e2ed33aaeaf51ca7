// Sixteen samples of a softmax head side by side in the lanes of a vector: their curvature times products.
//
// Samples come last in memory: a matrix product that writes them so fills its registers whatever the number of classes,
// and here no sum goes across lanes. The curvature annihilates constants, so it is taken of products less that of the
// likeliest class: nothing subtracts a probability from 1.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "softmax_head/lanes.h"
#include "softmax_head/softmax_head.h"

namespace kdfast {

constexpr int64_t kTerms = 64;  // that are added up in lanes before they go into doubles

// One part of the curvature: probabilities (classes, 16), and its weight.
template <class T>
struct Share {
  const T* p;
  T weight;
};

// Sums of each lane.
template <class T, int W>
struct LaneSums {
  Lanes<T, W> lanes = all<T, W>(0);
  double totals[kLanes] = {};

  KDFAST_INLINE void add(const Lanes<T, W>& v) { lanes = lanes + v; }
  KDFAST_INLINE void flush() {
    T now[kLanes];
    store(now, lanes);
    for (int i = 0; i < kLanes; ++i) totals[i] += static_cast<double>(now[i]);
    lanes = all<T, W>(0);
  }
};

// Elements of two vectors of four, numbered on from the first to the second.
template <int i, int j, int k, int l, class Four>
KDFAST_INLINE Four shuffled(const Four& a, const Four& b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i, j, k, l);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(4 * sizeof(Index))));
  return __builtin_shuffle(a, b, Indices{i, j, k, l});
#endif
}

// Four numbers of each of four samples, from `from` on, to four samples of each of four classes, `stride` apart.
template <class T>
KDFAST_INLINE void transpose_four(const T* const z[4], int64_t from, T* out, int64_t stride) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  Four rows[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&rows[i], z[i] + from, sizeof rows[i]);
  const Four a = shuffled<0, 4, 1, 5>(rows[0], rows[1]), b = shuffled<0, 4, 1, 5>(rows[2], rows[3]);
  const Four c = shuffled<2, 6, 3, 7>(rows[0], rows[1]), d = shuffled<2, 6, 3, 7>(rows[2], rows[3]);
  const Four columns[4] = {shuffled<0, 1, 4, 5>(a, b), shuffled<2, 3, 6, 7>(a, b), shuffled<0, 1, 4, 5>(c, d),
                           shuffled<2, 3, 6, 7>(c, d)};
  for (int j = 0; j < 4; ++j) std::memcpy(out + j * stride, &columns[j], sizeof columns[j]);
}

// The first `n` numbers of each of sixteen rows side by side: (n, 16), `stride` apart.
template <class T>
KDFAST_INLINE void side_by_side(const T* const rows[kLanes], int64_t n, T* out, int64_t stride) {
  for (int i = 0; i < kLanes; i += 4) {
    const T* const* z = rows + i;
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) transpose_four(z, j, out + j * stride + i, stride);
    for (; j < n; ++j)
      for (int k = 0; k < 4; ++k) out[j * stride + i + k] = z[k][j];
  }
}

// The largest logit of each sample, NaN where one of them is not finite, and the first class that has it.
template <class T, int W>
KDFAST_INLINE void likeliest(const T* z, int64_t classes, T* top, T* place) {
  Lanes<T, W> m = load<W>(z), at = all<T, W>(0), zero = m * at;
  for (int64_t j = 1; j < classes; ++j) {
    const Lanes<T, W> v = load<W>(z + j * kLanes);
    at = where_less(m, v, all<T, W>(static_cast<T>(j)), at);
    m = max(v, m);
    zero = zero * v;
  }
  store(top, m + zero);
  store(place, at);
}

// softmax(z / T) of each sample.
template <class T, int W>
KDFAST_INLINE void softmax(const T* z, const T* top, int64_t classes, T inv_t, T* p) {
  const Lanes<T, W> shift = load<W>(top), scale = all<T, W>(inv_t);
  LaneSums<T, W> sums;
  for (int64_t begin = 0; begin < classes; begin += kTerms) {
    for (int64_t j = begin; j < std::min(classes, begin + kTerms); ++j) {
      const Lanes<T, W> e = exp_nonpositive((load<W>(z + j * kLanes) - shift) * scale);
      store(p + j * kLanes, e);
      sums.add(e);
    }
    sums.flush();
  }
  T inverse[kLanes];
  for (int i = 0; i < kLanes; ++i) inverse[i] = static_cast<T>(1 / sums.totals[i]);
  const Lanes<T, W> factor = load<W>(inverse);
  for (int64_t j = 0; j < classes; ++j) store(p + j * kLanes, load<W>(p + j * kLanes) * factor);
}

// Products (classes, `stride`) of sixteen samples with one vector, in place: S times them, the sum over parts of
// weight p (v - mean), v being a product less that of the likeliest class.
template <class T, int W, int kParts>
KDFAST_INLINE void curve(T* a, int64_t classes, int64_t stride, const T* place, const Share<T>* parts) {
  T own[kLanes];
  for (int i = 0; i < kLanes; ++i) own[i] = a[static_cast<int64_t>(place[i]) * stride + i];
  const Lanes<T, W> shift = load<W>(own);
  LaneSums<T, W> sums[kParts];
  for (int64_t begin = 0; begin < classes; begin += kTerms) {
    for (int64_t j = begin; j < std::min(classes, begin + kTerms); ++j) {
      __builtin_prefetch(a + j * stride + kLanes);  // of the samples that come next
      const Lanes<T, W> v = load<W>(a + j * stride) - shift;
      for (int k = 0; k < kParts; ++k) sums[k].add(load<W>(parts[k].p + j * kLanes) * v);
    }
    for (int k = 0; k < kParts; ++k) sums[k].flush();
  }
  Lanes<T, W> means[kParts], weights[kParts];
  for (int k = 0; k < kParts; ++k) {
    for (int i = 0; i < kLanes; ++i) own[i] = static_cast<T>(sums[k].totals[i]);
    means[k] = load<W>(own);
    weights[k] = all<T, W>(parts[k].weight);
  }
  for (int64_t j = 0; j < classes; ++j) {
    const Lanes<T, W> v = load<W>(a + j * stride) - shift;
    Lanes<T, W> out = all<T, W>(0);
    for (int k = 0; k < kParts; ++k) out = out + weights[k] * load<W>(parts[k].p + j * kLanes) * (v - means[k]);
    store(a + j * stride, out);
  }
}

// Samples [row, row + count), count <= 16. Where they are fewer, their products go through `copy` (classes, 16):
// what lies behind them may be another thread's.
template <class T, int W, int kParts>
KDFAST_INLINE void curve_all(const HeadCurvature& a, int64_t row, int64_t count, const T* place, const Share<T>* parts,
                             T* copy) {
  const int64_t classes = a.head.classes;
  for (int64_t k = 0; k < a.vectors; ++k) {
    T* products = static_cast<T*>(a.products) + k * classes * a.stride + row;
    if (count == kLanes) {
      curve<T, W, kParts>(products, classes, a.stride, place, parts);
      continue;
    }
    for (int64_t j = 0; j < classes; ++j) std::copy_n(products + j * a.stride, count, copy + j * kLanes);
    curve<T, W, kParts>(copy, classes, kLanes, place, parts);
    for (int64_t j = 0; j < classes; ++j) std::copy_n(copy + j * kLanes, count, products + j * a.stride);
  }
}

// Groups [begin, end) of sixteen samples.
template <class T, int W>
KDFAST_INLINE void curvature_groups(const HeadCurvature& a, int64_t begin, int64_t end) {
  const HeadLogits& h = a.head;
  const int64_t size = h.classes * kLanes;
  std::vector<T> scratch(static_cast<size_t>(3 * size));
  T* z = scratch.data();
  for (int64_t group = begin; group < end; ++group) {
    const int64_t row = group * kLanes, samples = std::min<int64_t>(kLanes, h.rows - row);
    T top[kLanes], place[kLanes];
    Share<T> parts[2];
    int count = 0;
    // Behind the last sample, it is repeated.
    const T* rows[kLanes];
    for (int i = 0; i < kLanes; ++i)
      rows[i] = static_cast<const T*>(h.logits) + std::min(row + i, h.rows - 1) * h.stride;
    side_by_side(rows, h.classes, z, kLanes);
    likeliest<T, W>(z, h.classes, top, place);
    for (int soft = 0; soft < 2; ++soft) {
      const double weight = soft ? h.alpha : 1 - h.alpha;
      if (weight == 0) continue;
      T* p = z + (1 + count) * size;
      softmax<T, W>(z, top, h.classes, static_cast<T>(soft ? 1 / h.temperature : 1), p);
      parts[count++] = {p, static_cast<T>(weight)};
    }
    // The logits are read: their scratch is free.
    if (count == 1)
      curve_all<T, W, 1>(a, row, samples, place, parts, z);
    else
      curve_all<T, W, 2>(a, row, samples, place, parts, z);
  }
}

}  // namespace kdfast
