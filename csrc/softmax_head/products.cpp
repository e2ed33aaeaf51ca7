// Products of a softmax head's Hessian with few vectors, on a CPU with AVX-512: both matrix products and what lies
// between them for one group of samples after the other.
//
// The library's products go over the features twice, and all threads wait for each other in between. Here a thread
// takes its samples through to the end while their features lie in its own cache.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "softmax_head/sample_lanes.h"
#include "softmax_head/softmax_head.h"

namespace kdfast {
namespace {

constexpr int64_t kGroup = 96;            // samples: their features, and those products, stay in the second-level cache
constexpr int64_t kGroupsInFloats = 64;   // whose sums are added up before they go into doubles
constexpr int64_t kMostFloats = 1 << 17;  // of the vectors, likewise
constexpr int kMostColumns = 4;           // registers of a row that a block of products has
constexpr int64_t kMostSingle = 4;        // products that are summed up one by one rather than fill a register in part

// Zeros, from the start of a cache line on: a vector that lies in two lines is read at half the speed.
class Zeros {
 public:
  explicit Zeros(int64_t n) : lines_(static_cast<size_t>((n + kLanes - 1) / kLanes)) {}
  float* data() { return reinterpret_cast<float*>(lines_.data()); }
  const float* data() const { return reinterpret_cast<const float*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    float values[kLanes] = {};
  };
  std::vector<Line> lines_;
};

int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

#ifdef KDFAST_X86

constexpr int W = kLanes;
using Vector = Floats<W>;

// One element in all lanes. Assembly: the compiler would keep copies of it.
KDFAST_INLINE Vector repeated(const float* p) {
  Vector v;
  __asm__("vbroadcastss %1, %0" : "=v"(v.part[0]) : "m"(*p));
  return v;
}

// c += a b: c (kRows, kColumns vectors), a (kRows, depth), b (depth, kColumns vectors), each with a stride from row to
// row. The whole of c stays in registers.
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
  constexpr int kRows = kColumns == kMostColumns ? 6 : 8;
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

// And of up to kMostColumns vectors.
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

// c += a b^T: c (kRows, kColumns), a (kRows, depth), b (kColumns, depth). Its sums are over the lanes.
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

// What all threads read: sizes, and the given vectors by features: blocks of up to kMostColumns registers of products,
// each (width, 16 columns) contiguous, padded with zeros; then the bias of each product. The last few products, where
// they would leave most of a register empty, are `single`: they are taken from the given vectors as they lie.
struct Plan {
  const HeadProducts& args;
  int64_t numbers, padded, width, padded_width, stride, single, blocked, block_columns;
  Zeros by_feature, bias;

  explicit Plan(const HeadProducts& a)
      : args(a),
        numbers(a.vectors * a.head.classes),
        padded(whole_vectors(numbers)),
        width(a.width),
        padded_width(whole_vectors(a.width)),
        stride(width + a.bias),
        single(numbers % kLanes <= kMostSingle ? numbers % kLanes : 0),
        blocked(whole_vectors(numbers - single)),
        by_feature(blocked * width),
        bias(padded) {
    // Blocks of the same size: a narrow one for the rest would use fewer registers.
    const int64_t registers = blocked / kLanes, blocks = (registers + kMostColumns - 1) / kMostColumns;
    block_columns = blocks ? (registers + blocks - 1) / blocks * kLanes : kLanes;
    for (int64_t from = 0; from < blocked; from += block_columns) {
      const int64_t columns = columns_from(from);
      float* block = by_feature.data() + from * width;
      for (int64_t j = from; j < std::min(from + columns, numbers); ++j)
        for (int64_t k = 0; k < width; ++k) block[k * columns + j - from] = a.v[j * stride + k];
    }
    for (int64_t j = 0; a.bias && j < numbers; ++j) bias.data()[j] = a.v[j * stride + width];
  }

  // Products of the block that begins with product `from`.
  int64_t columns_from(int64_t from) const { return std::min<int64_t>(block_columns, blocked - from); }
};

// One part of the samples: adds B^T X of them to `totals`, which lie as the given vectors. Floats add up some groups,
// and doubles add up those sums: the error does not grow with the number of samples.
class Samples {
 public:
  Samples(const Plan& plan, double* totals)
      : plan_(plan),
        totals_(totals),
        sums_(plan.numbers * plan.padded_width),
        bias_sums_(plan.numbers),
        products_(kGroup * plan.padded),
        by_class_(kGroup * plan.padded),
        copy_(plan.padded_width > plan.width ? kGroup * plan.padded_width : 0) {}

  KDFAST_INLINE void add(int64_t begin, int64_t end) {
    for (int64_t row = begin, groups = 1; row < end; row += kGroup, ++groups) {
      add_group(row, std::min(kGroup, end - row));
      if (groups % kGroupsInFloats == 0 || row + kGroup >= end) flush();
    }
  }

 private:
  KDFAST_INLINE void add_group(int64_t row, int64_t n) {
    const HeadProducts& a = plan_.args;
    fetch_logits(row, n);
    int64_t stride = a.features_stride;
    const float* x = a.features + row * stride;
    const float* end = a.features + (a.head.rows - 1) * stride + plan_.width;
    if (x + (n - 1) * stride + plan_.padded_width > end) {
      // The last vector of some row would reach over the end of the features.
      for (int64_t i = 0; i < n; ++i) std::copy_n(x + i * stride, plan_.width, copy_.data() + i * plan_.padded_width);
      x = copy_.data();
      stride = plan_.padded_width;
    }
    forward(x, stride, n);
    HeadCurvature curvature{a.head, by_class_.data(), a.vectors, kGroup};
    curvature.head.logits = static_cast<const float*>(a.head.logits) + row * a.head.stride;
    curvature.head.rows = n;
    curvature_groups<float, W>(curvature, 0, (n + kLanes - 1) / kLanes);
    backward(x, stride, n);
  }

  // Starts to fetch the logits, to be there when the products are.
  KDFAST_INLINE void fetch_logits(int64_t row, int64_t n) const {
    const HeadLogits& h = plan_.args.head;
    for (int64_t i = row; i < row + n; ++i)
      for (int64_t j = 0; j < h.classes; j += kLanes)
        __builtin_prefetch(static_cast<const float*>(h.logits) + i * h.stride + j);
  }

  // A = X V^T, then samples last: (numbers, kGroup).
  KDFAST_INLINE void forward(const float* x, int64_t stride, int64_t n) {
    const int64_t padded = plan_.padded;
    for (int64_t i = 0; i < n; ++i) std::copy_n(plan_.bias.data(), padded, products_.data() + i * padded);
    for (int64_t from = 0; from < plan_.blocked; from += plan_.block_columns) {
      const int64_t columns = plan_.columns_from(from);
      add_product(x, stride, plan_.by_feature.data() + from * plan_.width, columns, plan_.width,
                  products_.data() + from, padded, n, columns / kLanes);
    }
    const int64_t first = plan_.numbers - plan_.single;
    add_all_dots(x, stride, plan_.args.v + first * plan_.stride, plan_.stride, plan_.width, products_.data() + first,
                 padded, n, plan_.single);
    for (int64_t i = 0; i < n; i += kLanes) {
      const float* rows[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) rows[k] = products_.data() + (i + k) * padded;
      side_by_side(rows, plan_.numbers, by_class_.data() + i, kGroup);
    }
  }

  // out += B^T X.
  KDFAST_INLINE void backward(const float* x, int64_t stride, int64_t n) {
    for (int64_t from = 0; from < plan_.padded_width; from += kMostColumns * kLanes) {
      const int64_t columns = std::min<int64_t>(kMostColumns * kLanes, plan_.padded_width - from);
      add_product(by_class_.data(), kGroup, x + from, stride, n, sums_.data() + from, plan_.padded_width, plan_.numbers,
                  columns / kLanes);
    }
    for (int64_t j = 0; plan_.args.bias && j < plan_.numbers; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += by_class_.data()[j * kGroup + i];
      bias_sums_.data()[j] += sum;
    }
  }

  // Moves the sums over to the totals.
  KDFAST_INLINE void flush() {
    for (int64_t j = 0; j < plan_.numbers; ++j) {
      float* sums = sums_.data() + j * plan_.padded_width;
      double* totals = totals_ + j * plan_.stride;
      for (int64_t k = 0; k < plan_.width; ++k) totals[k] += static_cast<double>(sums[k]);
      std::fill(sums, sums + plan_.padded_width, 0.0f);
      if (!plan_.args.bias) continue;
      totals[plan_.width] += static_cast<double>(bias_sums_.data()[j]);
      bias_sums_.data()[j] = 0;
    }
  }

  const Plan& plan_;
  double* totals_;
  Zeros sums_, bias_sums_, products_, by_class_, copy_;
};

__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) void add_samples(const Plan& plan, int64_t begin,
                                                                                   int64_t end, double* totals) {
  Samples(plan, totals).add(begin, end);
}

#endif

}  // namespace

bool head_products_fit(int64_t numbers, int64_t width) {
#ifdef KDFAST_X86
  return width > 0 && isa_level() >= 2 && whole_vectors(numbers) * whole_vectors(width) <= kMostFloats;
#else
  return static_cast<void>(numbers), static_cast<void>(width), false;
#endif
}

void head_products(const HeadProducts& args) {
  check_head(args.head);
  if (args.head.wide) throw std::invalid_argument("these products are of floats");
  if (args.width < 1 || args.vectors < 1) throw std::invalid_argument("there are no features or no vectors");
  if (!head_products_fit(args.vectors * args.head.classes, args.width))
    throw std::invalid_argument("this processor or these sizes need products by a library");
#ifdef KDFAST_X86
  const Plan plan(args);
  // Parts of the samples, each with totals of its own: the result does not depend on which thread takes which.
  const int64_t threads = std::max(args.head.threads, 1), rows = args.head.rows;
  const int64_t parts = std::clamp<int64_t>(rows / (4 * kGroup), 1, threads);
  const int64_t size = plan.numbers * plan.stride;
  std::vector<double> totals(static_cast<size_t>(parts * size));
  const int64_t cost = rows / parts * (plan.numbers * plan.width / 40 + 10);
  parallel_rows(parts, cost, args.head.threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      add_samples(plan, rows * part / parts, rows * (part + 1) / parts, totals.data() + part * size);
  });
  for (int64_t i = 0; i < size; ++i) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += totals[static_cast<size_t>(part * size + i)];
    args.out[i] += static_cast<float>(args.scale * total);
  }
#endif
}

}  // namespace kdfast
