// Norms of convolutions with one input channel per group: each kernel offset of an output channel is one dot product.
//
// The pixels of a channel are sorted by phase, their padded coordinates modulo the stride. Each phase is a plane, a
// grid on which a kernel offset is a shift. The output gradients are stored on a grid of the same width, with zeros in
// the gaps.
#include <algorithm>
#include <vector>

#include "grad_norms/algorithms.h"
#include "grad_norms/loops.h"

namespace kdfast::grad_norms {
namespace {

constexpr size_t kMaxRows = 9;  // offsets computed together: their sums fill the registers

class Depthwise final : public NormAlgorithm {
 public:
  explicit Depthwise(const Convolution& args) : a_(args), loops_(vector_loops(args.isa_limit)) {
    grid_height_ = a_.out_height + (a_.kernel[0] - 1) * a_.dilation[0] / a_.stride[0];
    grid_width_ = a_.out_width + (a_.kernel[1] - 1) * a_.dilation[1] / a_.stride[1];
    grid_end_ = (a_.out_height - 1) * grid_width_ + a_.out_width;
    plane_size_ = round_up(grid_height_ * grid_width_, kLanes) + kLanes;
    for (int64_t ky = 0; ky < a_.kernel[0]; ++ky) {
      for (int64_t kx = 0; kx < a_.kernel[1]; ++kx) {
        const int64_t y = ky * a_.dilation[0], x = kx * a_.dilation[1];
        const int64_t phase = y % a_.stride[0] * a_.stride[1] + x % a_.stride[1];
        starts_.push_back(phase * plane_size_ + y / a_.stride[0] * grid_width_ + x / a_.stride[1]);
      }
    }
  }

  int64_t scratch_size() const override { return (a_.stride[0] * a_.stride[1] + 1) * plane_size_; }

  int64_t work() const override { return a_.outputs * grid_end_ * (static_cast<int64_t>(starts_.size()) + 4); }

  double squared_norm(int64_t sample, float* scratch) const override {
    float *gradients = scratch, *planes = scratch + plane_size_;
    const int64_t multiplier = a_.outputs / a_.groups;
    double total = 0;
    for (int64_t channel = 0; channel < a_.channels; ++channel) {
      pack_image(a_.a + sample * a_.a_strides[0] + channel * a_.a_strides[1], planes);
      for (int64_t p = channel * multiplier; p < (channel + 1) * multiplier; ++p) {
        const float* b = a_.b + sample * a_.b_strides[0] + p * a_.b_strides[1];
        for (int64_t y = 0; y < a_.out_height; ++y)
          copy_strided(b + y * a_.b_strides[2], a_.b_strides[3], gradients + y * grid_width_, a_.out_width);
        for (size_t k = 0; k < starts_.size(); k += kMaxRows) {
          const int count = static_cast<int>(std::min(starts_.size() - k, kMaxRows));
          const float* rows[kMaxRows];
          for (size_t i = 0; i < static_cast<size_t>(count); ++i) rows[i] = planes + starts_[k + i];
          total += loops_.squared_dots(rows, count, gradients, grid_end_);
        }
      }
    }
    return total;
  }

 private:
  // Pixels outside the image stay zero, and so do the elements after a plane that its last vector reads.
  void pack_image(const float* a, float* planes) const {
    for (int64_t y = 0; y < grid_height_ * a_.stride[0]; ++y) {
      const int64_t line = y - a_.pad[0];
      if (line < 0 || line >= a_.height) continue;
      float* rows = planes + y % a_.stride[0] * a_.stride[1] * plane_size_ + y / a_.stride[0] * grid_width_;
      for (int64_t phase = 0; phase < a_.stride[1]; ++phase) {
        const int64_t step = a_.stride[1];
        const int64_t low = phase < a_.pad[1] ? (a_.pad[1] - phase + step - 1) / step : 0;
        const int64_t inside = a_.width + a_.pad[1] - phase;
        const int64_t high = std::min(inside > 0 ? (inside + step - 1) / step : 0, grid_width_);
        if (high <= low) continue;
        const float* from = a + line * a_.a_strides[2] + (low * step + phase - a_.pad[1]) * a_.a_strides[3];
        copy_strided(from, step * a_.a_strides[3], rows + phase * plane_size_ + low, high - low);
      }
    }
  }

  const Convolution& a_;
  const VectorLoops& loops_;
  int64_t grid_height_, grid_width_;
  int64_t grid_end_;             // end of the last position on the grid
  int64_t plane_size_;           // floats
  std::vector<int64_t> starts_;  // first pixel of each kernel offset
};

}  // namespace

std::unique_ptr<NormAlgorithm> make_depthwise(const Convolution& args) { return std::make_unique<Depthwise>(args); }

}  // namespace kdfast::grad_norms
