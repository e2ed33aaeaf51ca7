// The CPU algorithms for functions of a convolution's per-sample weight gradients.
#pragma once

#include <cstdint>
#include <memory>

#include "grad_norms/grad_norms.h"

namespace kdfast::grad_norms {

// Squared norms, one sample at a time, prepared for the sizes of one call.
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

// Sums of weighted squares and of squares over samples: one part of G at a time, for several samples, so that weights
// and sums are read once. A part belongs to one thread, which therefore adds its squares without races.
class ElementAlgorithm {
 public:
  virtual ~ElementAlgorithm() = default;
  // Packing: a sample has pieces that are packed independently, in `packed_size` floats together.
  virtual int64_t pieces() const = 0;
  virtual int64_t packed_size() const = 0;
  virtual void pack(int64_t sample, int64_t piece, float* packed, float* scratch) const = 0;
  // Parts of G.
  virtual int64_t parts() const = 0;
  // Multiply-adds per sample and part.
  virtual int64_t work() const = 0;
  // Writes the part's sum of weighted squares for `count` samples from `first`, and adds their squares. The samples are
  // packed at distances of `stride` floats.
  virtual void evaluate(int64_t part, int64_t first, int64_t count, const float* packed, int64_t stride, float* scratch,
                        double* sums) const = 0;
  // Floats of scratch per thread, as for NormAlgorithm.
  virtual int64_t scratch_size() const = 0;
};

std::unique_ptr<ElementAlgorithm> make_direct_elements(const Convolution& args);
std::unique_ptr<ElementAlgorithm> make_depthwise_elements(const Convolution& args);

}  // namespace kdfast::grad_norms
