// The curvature of a softmax head times products, for sixteen samples at a time, one per lane.
//
// Samples are the last dimension in memory: the matrix product that writes them then fills its registers for any number
// of classes, and no sum here crosses lanes. Since S 1 = 0, S is applied to products minus the product of the most
// probable class, so that nothing subtracts a probability from 1.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "softmax_head/lanes.h"
#include "softmax_head/softmax_head.h"

namespace kdfast::softmax_head {

constexpr int64_t kTerms = 64;  // terms summed in lanes before the lanes are added to doubles

// One part of the curvature: the probabilities p (classes, 16) and the weight of diag(p) - p p^T.
template <class T>
struct SoftmaxPart {
  const T* p;
  T weight;
};

// One sum per lane.
template <class T, int W>
struct LaneSums {
  Lanes<T, W> lanes = broadcast<T, W>(0);
  double totals[kLanes] = {};

  KDFAST_INLINE void add(const Lanes<T, W>& v) { lanes = lanes + v; }
  KDFAST_INLINE void flush() {
    T now[kLanes];
    store(now, lanes);
    for (int i = 0; i < kLanes; ++i) totals[i] += static_cast<double>(now[i]);
    lanes = broadcast<T, W>(0);
  }
};

// Elements i, j, k and l of the concatenation of two vectors of four.
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

// Transposes four numbers of each of four samples, starting at `from`, to four rows `stride` apart.
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

// Transposes the first `n` numbers of sixteen rows to (n, 16), with rows `stride` apart.
template <class T>
KDFAST_INLINE void transpose_rows(const T* const rows[kLanes], int64_t n, T* out, int64_t stride) {
  for (int i = 0; i < kLanes; i += 4) {
    const T* const* z = rows + i;
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) transpose_four(z, j, out + j * stride + i, stride);
    for (; j < n; ++j)
      for (int k = 0; k < 4; ++k) out[j * stride + i + k] = z[k][j];
  }
}

// Finds the largest logit of each sample, or NaN if one is not finite, and the first class that has it.
template <class T, int W>
KDFAST_INLINE void find_top_class(const T* z, int64_t classes, T* top, T* top_class) {
  Lanes<T, W> m = load<W>(z), at = broadcast<T, W>(0), zero = m * at;
  for (int64_t j = 1; j < classes; ++j) {
    const Lanes<T, W> v = load<W>(z + j * kLanes);
    at = where_less(m, v, broadcast<T, W>(static_cast<T>(j)), at);
    m = max(v, m);
    zero = zero * v;
  }
  store(top, m + zero);
  store(top_class, at);
}

// softmax(z / T) of each sample.
template <class T, int W>
KDFAST_INLINE void softmax(const T* z, const T* top, int64_t classes, T inv_t, T* p) {
  const Lanes<T, W> shift = load<W>(top), scale = broadcast<T, W>(inv_t);
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

// Multiplies the products (classes, `stride`) of sixteen samples with one vector by S, in place: the sum over parts of
// weight p (v - mean), where v is a product minus that of the most probable class and mean is the sum of p v.
template <class T, int W, int kParts>
KDFAST_INLINE void multiply(T* a, int64_t classes, int64_t stride, const T* top_class, const SoftmaxPart<T>* parts) {
  T own[kLanes];
  for (int i = 0; i < kLanes; ++i) own[i] = a[static_cast<int64_t>(top_class[i]) * stride + i];
  const Lanes<T, W> shift = load<W>(own);
  LaneSums<T, W> sums[kParts];
  for (int64_t begin = 0; begin < classes; begin += kTerms) {
    for (int64_t j = begin; j < std::min(classes, begin + kTerms); ++j) {
      __builtin_prefetch(a + j * stride + kLanes);  // of the next samples
      const Lanes<T, W> v = load<W>(a + j * stride) - shift;
      for (int k = 0; k < kParts; ++k) sums[k].add(load<W>(parts[k].p + j * kLanes) * v);
    }
    for (int k = 0; k < kParts; ++k) sums[k].flush();
  }
  Lanes<T, W> means[kParts], weights[kParts];
  for (int k = 0; k < kParts; ++k) {
    for (int i = 0; i < kLanes; ++i) own[i] = static_cast<T>(sums[k].totals[i]);
    means[k] = load<W>(own);
    weights[k] = broadcast<T, W>(parts[k].weight);
  }
  for (int64_t j = 0; j < classes; ++j) {
    const Lanes<T, W> v = load<W>(a + j * stride) - shift;
    Lanes<T, W> out = broadcast<T, W>(0);
    for (int k = 0; k < kParts; ++k) out = out + weights[k] * load<W>(parts[k].p + j * kLanes) * (v - means[k]);
    store(a + j * stride, out);
  }
}

// Multiplies the products of samples [row, row + count), count <= 16, with all vectors by S. Fewer than sixteen go
// through `copy` (classes, 16), since the memory after them may belong to another thread.
template <class T, int W, int kParts>
KDFAST_INLINE void multiply_vectors(const Curvature& a, int64_t row, int64_t count, const T* top_class,
                                    const SoftmaxPart<T>* parts, T* copy) {
  const int64_t classes = a.logits.classes;
  for (int64_t k = 0; k < a.vectors; ++k) {
    T* products = static_cast<T*>(a.products) + k * classes * a.stride + row;
    if (count == kLanes) {
      multiply<T, W, kParts>(products, classes, a.stride, top_class, parts);
      continue;
    }
    for (int64_t j = 0; j < classes; ++j) std::copy_n(products + j * a.stride, count, copy + j * kLanes);
    multiply<T, W, kParts>(copy, classes, kLanes, top_class, parts);
    for (int64_t j = 0; j < classes; ++j) std::copy_n(copy + j * kLanes, count, products + j * a.stride);
  }
}

// The softmaxes of sixteen samples and their weights, in scratch of 2 * classes * 16 elements. Returns how many there
// are: one if alpha is 0 or 1, else two.
template <class T, int W>
KDFAST_INLINE int softmax_parts(const Logits& h, const T* z, const T* top, T* scratch, SoftmaxPart<T>* parts) {
  int count = 0;
  for (int soft = 0; soft < 2; ++soft) {
    const double weight = soft ? h.alpha : 1 - h.alpha;
    if (weight == 0) continue;
    T* p = scratch + count * h.classes * kLanes;
    softmax<T, W>(z, top, h.classes, static_cast<T>(soft ? 1 / h.temperature : 1), p);
    parts[count++] = {p, static_cast<T>(weight)};
  }
  return count;
}

// Groups [begin, end) of sixteen samples.
template <class T>
struct ApplyCurvature {
  template <int W>
  KDFAST_INLINE static void run(const Curvature& a, int64_t begin, int64_t end) {
    const Logits& h = a.logits;
    const int64_t size = h.classes * kLanes;
    std::vector<T> scratch(static_cast<size_t>(3 * size));
    T* z = scratch.data();
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = group * kLanes, samples = std::min<int64_t>(kLanes, h.rows - row);
      T top[kLanes], top_class[kLanes];
      const T* rows[kLanes];
      for (int i = 0; i < kLanes; ++i)  // the last sample fills the lanes that are left
        rows[i] = static_cast<const T*>(h.data) + std::min(row + i, h.rows - 1) * h.stride;
      transpose_rows(rows, h.classes, z, kLanes);
      find_top_class<T, W>(z, h.classes, top, top_class);
      SoftmaxPart<T> parts[2];
      const int count = softmax_parts<T, W>(h, z, top, z + size, parts);
      // The logits are no longer needed, so their scratch serves as the copy.
      if (count == 1)
        multiply_vectors<T, W, 1>(a, row, samples, top_class, parts, z);
      else
        multiply_vectors<T, W, 2>(a, row, samples, top_class, parts, z);
    }
  }
};

}  // namespace kdfast::softmax_head
