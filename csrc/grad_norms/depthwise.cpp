// Convolutions with one input channel per group: each kernel offset of an output channel is one dot product.
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

// The pixels and output gradients of one channel on the grid.
class Planes {
 public:
  explicit Planes(const Convolution& args) : a_(args) {
    grid_height_ = a_.out_height + (a_.kernel[0] - 1) * a_.dilation[0] / a_.stride[0];
    grid_width_ = a_.out_width + (a_.kernel[1] - 1) * a_.dilation[1] / a_.stride[1];
    grid_end = (a_.out_height - 1) * grid_width_ + a_.out_width;
    plane_size = round_up(grid_height_ * grid_width_, kLanes) + kLanes;
    for (int64_t ky = 0; ky < a_.kernel[0]; ++ky) {
      for (int64_t kx = 0; kx < a_.kernel[1]; ++kx) {
        const int64_t y = ky * a_.dilation[0], x = kx * a_.dilation[1];
        const int64_t phase = y % a_.stride[0] * a_.stride[1] + x % a_.stride[1];
        starts_.push_back(phase * plane_size + y / a_.stride[0] * grid_width_ + x / a_.stride[1]);
      }
    }
  }

  int64_t grid_end;    // end of the last position on the grid
  int64_t plane_size;  // floats

  int64_t offsets() const { return static_cast<int64_t>(starts_.size()); }
  int64_t scratch_size() const { return (a_.stride[0] * a_.stride[1] + 1) * plane_size; }
  // Multiply-adds per sample and output channel.
  int64_t work() const { return grid_end * (offsets() + 4); }

  // Calls visit(output, first offset, offsets, their rows of pixels, gradients) for groups of offsets.
  template <class Visit>
  void for_each_output(int64_t sample, int64_t channel, float* scratch, const Visit& visit) const {
    float *gradients = scratch, *planes = scratch + plane_size;
    const int64_t multiplier = a_.outputs / a_.groups;
    pack_image(a_.a + sample * a_.a_strides[0] + channel * a_.a_strides[1], planes);
    for (int64_t p = channel * multiplier; p < (channel + 1) * multiplier; ++p) {
      const float* b = a_.b + sample * a_.b_strides[0] + p * a_.b_strides[1];
      for (int64_t y = 0; y < a_.out_height; ++y)
        copy_strided(b + y * a_.b_strides[2], a_.b_strides[3], gradients + y * grid_width_, a_.out_width);
      for (size_t k = 0; k < starts_.size(); k += kMaxRows) {
        const int count = static_cast<int>(std::min(starts_.size() - k, kMaxRows));
        const float* rows[kMaxRows];
        for (size_t i = 0; i < static_cast<size_t>(count); ++i) rows[i] = planes + starts_[k + i];
        visit(p, static_cast<int64_t>(k), count, rows, gradients);
      }
    }
  }

 private:
  // Pixels outside the image stay zero, and so do the elements after a plane that its last vector reads.
  void pack_image(const float* a, float* planes) const {
    for (int64_t y = 0; y < grid_height_ * a_.stride[0]; ++y) {
      const int64_t line = y - a_.pad[0];
      if (line < 0 || line >= a_.height) continue;
      float* rows = planes + y % a_.stride[0] * a_.stride[1] * plane_size + y / a_.stride[0] * grid_width_;
      for (int64_t phase = 0; phase < a_.stride[1]; ++phase) {
        const int64_t step = a_.stride[1];
        const int64_t low = phase < a_.pad[1] ? (a_.pad[1] - phase + step - 1) / step : 0;
        const int64_t inside = a_.width + a_.pad[1] - phase;
        const int64_t high = std::min(inside > 0 ? (inside + step - 1) / step : 0, grid_width_);
        if (high <= low) continue;
        const float* from = a + line * a_.a_strides[2] + (low * step + phase - a_.pad[1]) * a_.a_strides[3];
        copy_strided(from, step * a_.a_strides[3], rows + phase * plane_size + low, high - low);
      }
    }
  }

  const Convolution& a_;
  int64_t grid_height_, grid_width_;
  std::vector<int64_t> starts_;  // first pixel of each kernel offset
};

class Depthwise final : public NormAlgorithm {
 public:
  explicit Depthwise(const Convolution& args) : a_(args), planes_(args), loops_(vector_loops(args.isa_limit)) {}

  int64_t scratch_size() const override { return planes_.scratch_size(); }
  int64_t work() const override { return a_.outputs * planes_.work(); }

  double squared_norm(int64_t sample, float* scratch) const override {
    double total = 0;
    for (int64_t channel = 0; channel < a_.channels; ++channel) {
      planes_.for_each_output(sample, channel, scratch,
                              [&](int64_t, int64_t, int count, const float* const* rows, const float* gradients) {
                                total += loops_.squared_dots(rows, count, gradients, planes_.grid_end);
                              });
    }
    return total;
  }

 private:
  const Convolution& a_;
  const Planes planes_;
  const VectorLoops& loops_;
};

// A part is a channel.
class DepthwiseElements final : public ElementAlgorithm {
 public:
  explicit DepthwiseElements(const Convolution& args) : a_(args), planes_(args), loops_(vector_loops(args.isa_limit)) {}

  int64_t pieces() const override { return 0; }
  int64_t packed_size() const override { return 0; }
  void pack(int64_t, int64_t, float*, float*) const override {}
  int64_t parts() const override { return a_.channels; }
  int64_t work() const override { return a_.outputs / a_.groups * planes_.work(); }
  int64_t scratch_size() const override { return planes_.scratch_size(); }

  void evaluate(int64_t channel, int64_t first, int64_t count, const float*, int64_t, float* scratch,
                double* sums) const override {
    for (int64_t i = 0; i < count; ++i) {
      double total = 0;
      planes_.for_each_output(
          first + i, channel, scratch,
          [&](int64_t p, int64_t k, int rows_count, const float* const* rows, const float* gradients) {
            double dots[kMaxRows];
            loops_.dots(rows, rows_count, gradients, planes_.grid_end, dots);
            const int64_t at = p * planes_.offsets() + k;
            for (int r = 0; r < rows_count; ++r) {
              const double square = dots[r] * dots[r];
              if (a_.weights) total += square * static_cast<double>(a_.weights[at + r]);
              if (a_.squares) a_.squares[at + r] += square;
            }
          });
      sums[i] = total;
    }
  }

 private:
  const Convolution& a_;
  const Planes planes_;
  const VectorLoops& loops_;
};

}  // namespace

std::unique_ptr<NormAlgorithm> make_depthwise(const Convolution& args) { return std::make_unique<Depthwise>(args); }

std::unique_ptr<ElementAlgorithm> make_depthwise_elements(const Convolution& args) {
  return std::make_unique<DepthwiseElements>(args);
}

}  // namespace kdfast::grad_norms
