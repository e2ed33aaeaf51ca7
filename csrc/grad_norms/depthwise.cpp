// Convolutions with one input channel a group: each kernel offset of a channel is one dot product.
//
// Pixels are sorted by phase, their padded coordinates modulo the stride, on a grid of `wide` columns in which an
// offset is a shift; output gradients lie on a grid as wide, with zeros in its gaps.
#include <algorithm>
#include <vector>

#include "grad_norms/algorithms.h"
#include "grad_norms/loops.h"

namespace kdfast {
namespace {

// Offsets at once: their sums fill the registers.
constexpr size_t kMostRows = 9;

class Depthwise final : public GhostWay {
 public:
  explicit Depthwise(const GhostConv& args) : a_(args), kernels_(ghost_kernels(args.isa_limit)) {
    high_ = a_.out_height + (a_.kernel[0] - 1) * a_.dilation[0] / a_.stride[0];
    wide_ = a_.out_width + (a_.kernel[1] - 1) * a_.dilation[1] / a_.stride[1];
    end_ = (a_.out_height - 1) * wide_ + a_.out_width;
    plane_ = round_up(high_ * wide_, kLanes) + kLanes;
    for (int64_t ky = 0; ky < a_.kernel[0]; ++ky) {
      for (int64_t kx = 0; kx < a_.kernel[1]; ++kx) {
        const int64_t y = ky * a_.dilation[0], x = kx * a_.dilation[1];
        const int64_t phase = y % a_.stride[0] * a_.stride[1] + x % a_.stride[1];
        starts_.push_back(phase * plane_ + y / a_.stride[0] * wide_ + x / a_.stride[1]);
      }
    }
  }

  int64_t scratch() const override { return (a_.stride[0] * a_.stride[1] + 1) * plane_; }

  int64_t work() const override { return a_.outputs * end_ * (static_cast<int64_t>(starts_.size()) + 4); }

  double square(int64_t sample, float* scratch) const override {
    float *gradients = scratch, *planes = scratch + plane_;
    const int64_t multiplier = a_.outputs / a_.groups;
    double total = 0;
    for (int64_t channel = 0; channel < a_.channels; ++channel) {
      pack_image(a_.a + sample * a_.a_strides[0] + channel * a_.a_strides[1], planes);
      for (int64_t p = channel * multiplier; p < (channel + 1) * multiplier; ++p) {
        const float* b = a_.b + sample * a_.b_strides[0] + p * a_.b_strides[1];
        for (int64_t y = 0; y < a_.out_height; ++y)
          copy_strided(b + y * a_.b_strides[2], a_.b_strides[3], gradients + y * wide_, a_.out_width);
        for (size_t k = 0; k < starts_.size(); k += kMostRows) {
          const int count = static_cast<int>(std::min(starts_.size() - k, kMostRows));
          const float* rows[kMostRows];
          for (size_t i = 0; i < static_cast<size_t>(count); ++i) rows[i] = planes + starts_[k + i];
          total += kernels_.correlate(rows, count, gradients, end_);
        }
      }
    }
    return total;
  }

 private:
  // Pixels outside the image stay zero, and so does what the last vector of a row reads behind a plane.
  void pack_image(const float* a, float* planes) const {
    for (int64_t y = 0; y < high_ * a_.stride[0]; ++y) {
      const int64_t line = y - a_.pad[0];
      if (line < 0 || line >= a_.height) continue;
      float* rows = planes + y % a_.stride[0] * a_.stride[1] * plane_ + y / a_.stride[0] * wide_;
      for (int64_t phase = 0; phase < a_.stride[1]; ++phase) {
        const int64_t step = a_.stride[1];
        const int64_t low = phase < a_.pad[1] ? (a_.pad[1] - phase + step - 1) / step : 0;
        const int64_t inside = a_.width + a_.pad[1] - phase;
        const int64_t high = std::min(inside > 0 ? (inside + step - 1) / step : 0, wide_);
        if (high <= low) continue;
        const float* from = a + line * a_.a_strides[2] + (low * step + phase - a_.pad[1]) * a_.a_strides[3];
        copy_strided(from, step * a_.a_strides[3], rows + phase * plane_ + low, high - low);
      }
    }
  }

  const GhostConv& a_;
  const GhostKernels& kernels_;
  int64_t high_, wide_, end_, plane_;
  std::vector<int64_t> starts_;  // where each offset's plane begins
};

}  // namespace

std::unique_ptr<GhostWay> ghost_depthwise(const GhostConv& args) { return std::make_unique<Depthwise>(args); }

}  // namespace kdfast
