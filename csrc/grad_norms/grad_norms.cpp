// Squared norms of a convolution's per-sample weight gradients on a CPU: samples split over threads.
#include "grad_norms/grad_norms.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"
#include "grad_norms/algorithms.h"

namespace kdfast::grad_norms {
namespace {

std::unique_ptr<NormAlgorithm> make_algorithm(const Convolution& a) {
  return a.algorithm == kDirect ? make_direct(a) : a.algorithm == kGram ? make_pixel_gram(a) : make_depthwise(a);
}

}  // namespace

void squared_norms(const Convolution& args) {
  check(args);
  const std::unique_ptr<NormAlgorithm> algorithm = make_algorithm(args);
  const int threads = static_cast<int>(std::clamp<int64_t>(args.threads, 1, std::max<int64_t>(args.batch, 1)));
  const int64_t size = round_up(algorithm->scratch_size(), kLanes);
  std::vector<float> memory(static_cast<size_t>(threads * size + kLanes));
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory.data()));
  float* scratch = memory.data() + (round_up(address, 64) - address) / 4;
  // A core performs about 50 multiply-adds per nanosecond.
  parallel_rows(args.batch, algorithm->work() / 50 + 100, threads, [&](int64_t begin, int64_t end, int slot) {
    for (int64_t i = begin; i < end; ++i) args.out[i] = algorithm->squared_norm(i, scratch + slot * size);
  });
}

}  // namespace kdfast::grad_norms
