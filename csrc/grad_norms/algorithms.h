// The CPU algorithms for squared norms of a convolution's per-sample weight gradients, one sample at a time.
#pragma once

#include <cstdint>
#include <memory>

#include "grad_norms/grad_norms.h"

namespace kdfast::grad_norms {

// An algorithm prepared for the sizes of one call.
class NormAlgorithm {
 public:
  virtual ~NormAlgorithm() = default;
  // Floats of scratch per thread. The scratch is zero and aligned to a cache line before a thread's first sample and is
  // not cleared between samples: elements that the algorithm never writes stay zero.
  virtual int64_t scratch_size() const = 0;
  // Multiply-adds per sample.
  virtual int64_t work() const = 0;
  // ||G_n||^2.
  virtual double squared_norm(int64_t sample, float* scratch) const = 0;
};

std::unique_ptr<NormAlgorithm> make_direct(const Convolution& args);
std::unique_ptr<NormAlgorithm> make_pixel_gram(const Convolution& args);
std::unique_ptr<NormAlgorithm> make_depthwise(const Convolution& args);

}  // namespace kdfast::grad_norms
