// The ways to the norms of a convolution's per-sample weight gradients, one sample at a time.
#pragma once

#include <cstdint>
#include <memory>

#include "grad_norms/grad_norms.h"

namespace kdfast {

// Knows one call's sizes; each thread lends it scratch.
class GhostWay {
 public:
  virtual ~GhostWay() = default;
  // Floats of scratch. They are zero, at a cache line, before a thread's first sample, and stay as that sample left
  // them: what a way never writes remains zero.
  virtual int64_t scratch() const = 0;
  // Multiply-adds of one sample.
  virtual int64_t work() const = 0;
  // ||G_n||^2.
  virtual double square(int64_t sample, float* scratch) const = 0;
};

std::unique_ptr<GhostWay> ghost_direct(const GhostConv& args);
std::unique_ptr<GhostWay> ghost_pixel(const GhostConv& args);
std::unique_ptr<GhostWay> ghost_depthwise(const GhostConv& args);

}  // namespace kdfast
