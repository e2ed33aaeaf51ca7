// Multiplies products by the curvature of a softmax head on a CPU: groups of sixteen samples split over threads.
#include <stdexcept>

#include "common/parallel.h"
#include "softmax_head/sample_lanes.h"
#include "softmax_head/softmax_head.h"

namespace kdfast::softmax_head {
namespace {

struct Kernels {
  void (*apply[2])(const Curvature&, int64_t, int64_t);  // for float and double
};

template <class Isa>
constexpr Kernels make_kernels() {
  return {{Isa::template run<ApplyCurvature<float>>, Isa::template run<ApplyCurvature<double>>}};
}

constexpr Kernels kKernels[] = KDFAST_FOR_EACH_ISA(make_kernels);

}  // namespace

void apply_curvature(const Curvature& args) {
  const Logits& h = args.logits;
  check(h);
  if (args.stride < h.rows) throw std::invalid_argument("the stride of the products is smaller than the samples");
  if (h.rows == 0 || args.vectors == 0) return;
  const auto kernel = kKernels[isa_level(h.isa_limit)].apply[h.is_double];
  const int64_t cost = kLanes * (20 + h.classes / 4 + args.vectors * (h.classes / 8 + 1));
  parallel_rows((h.rows + kLanes - 1) / kLanes, cost, h.threads,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace kdfast::softmax_head
