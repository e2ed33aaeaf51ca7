// The curvature of a softmax head times products, on a CPU.
#include <array>
#include <stdexcept>

#include "common/parallel.h"
#include "softmax_head/sample_lanes.h"
#include "softmax_head/softmax_head.h"

namespace kdfast {
namespace {

#define KDFAST_CURVATURE(suffix, width, attribute)                                        \
  template <class T>                                                                      \
  attribute void curvature_##suffix(const HeadCurvature& a, int64_t begin, int64_t end) { \
    curvature_groups<T, width>(a, begin, end);                                            \
  }
KDFAST_FOR_EACH_ISA(KDFAST_CURVATURE)
#undef KDFAST_CURVATURE

#define KDFAST_CURVATURE_TABLE(suffix, width, attribute) \
  const auto table_##suffix = std::array{curvature_##suffix<float>, curvature_##suffix<double>};
KDFAST_FOR_EACH_ISA(KDFAST_CURVATURE_TABLE)
#undef KDFAST_CURVATURE_TABLE

}  // namespace

void head_curvature(const HeadCurvature& args) {
  const HeadLogits& h = args.head;
  check_head(h);
  if (args.stride < h.rows) throw std::invalid_argument("products of a class are fewer than the samples");
  if (h.rows == 0 || args.vectors == 0) return;
  const int level = isa_level(h.isa_limit);
  const auto kernel = KDFAST_PICK_ISA(level, table)[h.wide];
  const int64_t cost = kLanes * (20 + h.classes / 4 + args.vectors * (h.classes / 8 + 1));
  parallel_rows((h.rows + kLanes - 1) / kLanes, cost, h.threads,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace kdfast
