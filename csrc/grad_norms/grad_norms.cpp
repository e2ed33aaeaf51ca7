// Functions of a convolution's per-sample weight gradients on a CPU. Norms split samples over threads, functions of the
// elements parts of G.
#include "grad_norms/grad_norms.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"
#include "grad_norms/algorithms.h"

namespace kdfast::grad_norms {
namespace {

// Samples that are packed together: at most 4 MB where several fit.
constexpr int64_t kPackedFloats = int64_t{1} << 20;
constexpr int64_t kMaxPacked = 32;  // their squares are added in float

// Zeros, aligned to a cache line. From calloc, whose large blocks need not be cleared.
class Zeros {
 public:
  explicit Zeros(int64_t size) : memory_(std::calloc(static_cast<size_t>(size + kLanes), sizeof(float))) {
    if (!memory_) throw std::bad_alloc();
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory_.get()));
    data_ = static_cast<float*>(memory_.get()) + (round_up(address, 64) - address) / 4;
  }
  float* data() const { return data_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  float* data_;
};

// A core performs about 50 multiply-adds per nanosecond.
int64_t nanoseconds(int64_t work) { return work / 50 + 100; }

int threads_for(const Convolution& a, int64_t tasks) {
  return static_cast<int>(std::clamp<int64_t>(a.threads, 1, std::max<int64_t>(tasks, 1)));
}

void norms(const Convolution& args) {
  const std::unique_ptr<NormAlgorithm> algorithm = args.algorithm == kDirect ? make_direct(args)
                                                   : args.algorithm == kGram ? make_pixel_gram(args)
                                                                             : make_depthwise(args);
  const int threads = threads_for(args, args.batch);
  const int64_t size = round_up(algorithm->scratch_size(), kLanes);
  const Zeros scratch(threads * size);
  parallel_rows(args.batch, nanoseconds(algorithm->work()), threads, [&](int64_t begin, int64_t end, int slot) {
    for (int64_t i = begin; i < end; ++i) args.out[i] = algorithm->squared_norm(i, scratch.data() + slot * size);
  });
}

void elements(const Convolution& args) {
  const std::unique_ptr<ElementAlgorithm> algorithm =
      args.algorithm == kDirect ? make_direct_elements(args) : make_depthwise_elements(args);
  const int64_t parts = algorithm->parts(), pieces = algorithm->pieces();
  const int64_t stride = round_up(algorithm->packed_size(), kLanes);
  const int64_t fit = std::clamp<int64_t>(kPackedFloats / std::max<int64_t>(stride, 1), 1, kMaxPacked);
  const int64_t chunk = std::min(fit, std::max<int64_t>(args.batch, 1));
  const int threads = threads_for(args, std::max(parts, chunk * pieces));
  const int64_t size = round_up(algorithm->scratch_size(), kLanes);
  const Zeros scratch(threads * size), packed(chunk * stride);
  std::vector<double> sums(static_cast<size_t>(parts * chunk));
  for (int64_t first = 0; first < args.batch; first += chunk) {
    const int64_t count = std::min(chunk, args.batch - first);
    // Packing moves a float in about a nanosecond.
    const int64_t cost = pieces ? stride / pieces : 0;
    parallel_rows(count * pieces, cost, threads, [&](int64_t begin, int64_t end, int slot) {
      for (int64_t i = begin; i < end; ++i)
        algorithm->pack(first + i / pieces, i % pieces, packed.data() + i / pieces * stride,
                        scratch.data() + slot * size);
    });
    parallel_rows(parts, nanoseconds(algorithm->work() * count), threads, [&](int64_t begin, int64_t end, int slot) {
      for (int64_t i = begin; i < end; ++i)
        algorithm->evaluate(i, first, count, packed.data(), stride, scratch.data() + slot * size,
                            sums.data() + i * chunk);
    });
    if (args.squares) continue;
    for (int64_t i = 0; i < count; ++i) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[static_cast<size_t>(part * chunk + i)];
      args.out[first + i] = total;
    }
  }
}

}  // namespace

void squared_norms(const Convolution& args) {
  check(args);
  if (args.weights || args.squares) return elements(args);
  norms(args);
}

}  // namespace kdfast::grad_norms
