// Products of a softmax head's Hessian with few vectors, B^T X with B = S (X V^T), on a CPU with AVX-512: both matrix
// products and the curvature between them, for one group of samples after the other.
//
// Two library products would read the features twice, and all threads would wait for each other in between. Here a
// thread completes a group of samples while the group's features are in its own cache.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "softmax_head/matrix_products.h"
#include "softmax_head/sample_lanes.h"
#include "softmax_head/softmax_head.h"

namespace kdfast::softmax_head {
namespace {

#ifdef KDFAST_X86

constexpr int64_t kGroup = 96;           // samples whose features and products fit the second-level cache
constexpr int64_t kGroupsInFloats = 64;  // groups summed in floats before the sums are added to doubles
constexpr int64_t kMaxFloats = 1 << 17;  // of the vectors, so that they fit that cache too
constexpr int64_t kMaxSingle = 4;        // remaining products computed one by one instead of in a register

// Floats that start as zeros and at a cache line: reading a vector that spans two lines takes twice as long.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t n) : lines_(static_cast<size_t>((n + kLanes - 1) / kLanes)) {}
  float* data() { return reinterpret_cast<float*>(lines_.data()); }
  const float* data() const { return reinterpret_cast<const float*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    float values[kLanes] = {};
  };
  std::vector<Line> lines_;
};

int64_t round_up_to_vector(int64_t n) { return round_up(n, kLanes); }

// Inputs that all threads read: the sizes, and the vectors transposed. by_feature has blocks of up to kMaxColumns
// registers of products, each block (width, columns) contiguous and padded with zeros; bias has the bias of each
// product. The last few products, if they would leave most of a register empty, are `single` and computed from the
// vectors as given.
struct Plan {
  const HessianProducts& args;
  int64_t product_count, padded, width, padded_width, stride, single, blocked, block_columns;
  AlignedFloats by_feature, bias;

  explicit Plan(const HessianProducts& a)
      : args(a),
        product_count(a.vectors * a.logits.classes),
        padded(round_up_to_vector(product_count)),
        width(a.width),
        padded_width(round_up_to_vector(a.width)),
        stride(width + a.bias),
        single(product_count % kLanes <= kMaxSingle ? product_count % kLanes : 0),
        blocked(round_up_to_vector(product_count - single)),
        by_feature(blocked * width),
        bias(padded) {
    // Blocks have the same size: a narrow last block would use fewer registers.
    const int64_t registers = blocked / kLanes, blocks = (registers + kMaxColumns - 1) / kMaxColumns;
    block_columns = blocks ? (registers + blocks - 1) / blocks * kLanes : kLanes;
    for (int64_t from = 0; from < blocked; from += block_columns) {
      const int64_t columns = columns_from(from);
      float* block = by_feature.data() + from * width;
      for (int64_t j = from; j < std::min(from + columns, product_count); ++j)
        for (int64_t k = 0; k < width; ++k) block[k * columns + j - from] = a.v[j * stride + k];
    }
    for (int64_t j = 0; a.bias && j < product_count; ++j) bias.data()[j] = a.v[j * stride + width];
  }

  // Columns of the block that begins with product `from`.
  int64_t columns_from(int64_t from) const { return std::min<int64_t>(block_columns, blocked - from); }
};

// Adds B^T X of one part of the samples to `totals`, which has the layout of the vectors. Floats sum some groups and
// doubles sum those results, so that the error does not grow with the number of samples.
class PartSum {
 public:
  PartSum(const Plan& plan, double* totals)
      : plan_(plan),
        totals_(totals),
        sums_(plan.product_count * plan.padded_width),
        bias_sums_(plan.product_count),
        products_(kGroup * plan.padded),
        transposed_(kGroup * plan.padded),
        copy_(plan.padded_width > plan.width ? kGroup * plan.padded_width : 0) {}

  KDFAST_INLINE void add(int64_t begin, int64_t end) {
    for (int64_t row = begin, groups = 1; row < end; row += kGroup, ++groups) {
      add_group(row, std::min(kGroup, end - row));
      if (groups % kGroupsInFloats == 0 || row + kGroup >= end) flush();
    }
  }

 private:
  KDFAST_INLINE void add_group(int64_t row, int64_t n) {
    const HessianProducts& a = plan_.args;
    prefetch_logits(row, n);
    int64_t stride = a.features_stride;
    const float* x = a.features + row * stride;
    const float* end = a.features + (a.logits.rows - 1) * stride + plan_.width;
    if (x + (n - 1) * stride + plan_.padded_width > end) {
      // The last vector of some row would read beyond the features.
      for (int64_t i = 0; i < n; ++i) std::copy_n(x + i * stride, plan_.width, copy_.data() + i * plan_.padded_width);
      x = copy_.data();
      stride = plan_.padded_width;
    }
    forward(x, stride, n);
    Curvature curvature{a.logits, transposed_.data(), a.vectors, kGroup};
    curvature.logits.data = static_cast<const float*>(a.logits.data) + row * a.logits.stride;
    curvature.logits.rows = n;
    ApplyCurvature<float>::run<W>(curvature, 0, (n + kLanes - 1) / kLanes);
    backward(x, stride, n);
  }

  // Prefetches the logits, which are needed after the first product.
  KDFAST_INLINE void prefetch_logits(int64_t row, int64_t n) const {
    const Logits& h = plan_.args.logits;
    for (int64_t i = row; i < row + n; ++i)
      for (int64_t j = 0; j < h.classes; j += kLanes)
        __builtin_prefetch(static_cast<const float*>(h.data) + i * h.stride + j);
  }

  // A = X V^T, then transposed to (product_count, kGroup).
  KDFAST_INLINE void forward(const float* x, int64_t stride, int64_t n) {
    const int64_t padded = plan_.padded;
    for (int64_t i = 0; i < n; ++i) std::copy_n(plan_.bias.data(), padded, products_.data() + i * padded);
    for (int64_t from = 0; from < plan_.blocked; from += plan_.block_columns) {
      const int64_t columns = plan_.columns_from(from);
      add_product(x, stride, plan_.by_feature.data() + from * plan_.width, columns, plan_.width,
                  products_.data() + from, padded, n, columns / kLanes);
    }
    const int64_t first = plan_.product_count - plan_.single;
    add_all_dots(x, stride, plan_.args.v + first * plan_.stride, plan_.stride, plan_.width, products_.data() + first,
                 padded, n, plan_.single);
    for (int64_t i = 0; i < n; i += kLanes) {
      const float* rows[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) rows[k] = products_.data() + (i + k) * padded;
      transpose_rows(rows, plan_.product_count, transposed_.data() + i, kGroup);
    }
  }

  // sums += B^T X.
  KDFAST_INLINE void backward(const float* x, int64_t stride, int64_t n) {
    for (int64_t from = 0; from < plan_.padded_width; from += kMaxColumns * kLanes) {
      const int64_t columns = std::min<int64_t>(kMaxColumns * kLanes, plan_.padded_width - from);
      add_product(transposed_.data(), kGroup, x + from, stride, n, sums_.data() + from, plan_.padded_width,
                  plan_.product_count, columns / kLanes);
    }
    for (int64_t j = 0; plan_.args.bias && j < plan_.product_count; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += transposed_.data()[j * kGroup + i];
      bias_sums_.data()[j] += sum;
    }
  }

  // Adds the sums to the totals and clears them.
  KDFAST_INLINE void flush() {
    for (int64_t j = 0; j < plan_.product_count; ++j) {
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
  AlignedFloats sums_, bias_sums_, products_, transposed_, copy_;
};

KDFAST_TARGET_V4 void add_samples(const Plan& plan, int64_t begin, int64_t end, double* totals) {
  PartSum(plan, totals).add(begin, end);
}

#endif

}  // namespace

bool hessian_products_fit(int64_t product_count, int64_t width) {
#ifdef KDFAST_X86
  return width > 0 && isa_level() >= 2 && round_up_to_vector(product_count) * round_up_to_vector(width) <= kMaxFloats;
#else
  return static_cast<void>(product_count), static_cast<void>(width), false;
#endif
}

void add_hessian_products(const HessianProducts& args) {
  check(args.logits);
  if (args.logits.is_double)
    throw std::invalid_argument("Hessian products of doubles are not supported: use a matrix library");
  if (args.width < 1 || args.vectors < 1)
    throw std::invalid_argument("Hessian products need at least one feature and one vector");
  if (!hessian_products_fit(args.vectors * args.logits.classes, args.width))
    throw std::invalid_argument("this processor or these sizes are not supported: use a matrix library");
#ifdef KDFAST_X86
  const Plan plan(args);
  // Each part of the samples has its own totals, so that the result does not depend on which thread computes which
  // part.
  const int64_t threads = std::max(args.logits.threads, 1), rows = args.logits.rows;
  const int64_t parts = std::clamp<int64_t>(rows / (4 * kGroup), 1, threads);
  const int64_t size = plan.product_count * plan.stride;
  std::vector<double> totals(static_cast<size_t>(parts * size));
  const int64_t cost = rows / parts * (plan.product_count * plan.width / 40 + 10);
  parallel_rows(parts, cost, args.logits.threads, [&](int64_t begin, int64_t end) {
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

}  // namespace kdfast::softmax_head
