// Norms from Gram matrices of pixels. With G = sum_t b_t a_t^T over positions,
//   ||G||^2 = sum over t, s of <b_t, b_s> <a_t, a_s>,
//   <a_t, a_s> = sum over kernel offsets o of <pixel(t, o), pixel(s, o)>.
//
// Pixels are sorted by phase, their padded coordinates modulo the stride: a kernel offset reaches the pixels of one
// phase only. Within a phase with a grid of `grid_width` columns, position (y, x) reaches through an offset the pixel
// y * grid_width + x + shift. The Gram matrix of a phase is stored on that grid, with zeros for the padding, so that an
// offset is a shift of both indices.
#include <algorithm>
#include <vector>

#include "grad_norms/algorithms.h"
#include "grad_norms/loops.h"

namespace kdfast::grad_norms {
namespace {

constexpr int64_t kDepth = 128;  // channels multiplied at a time: a panel of them fits the L1 cache
constexpr int kOffsets = 16;     // kernel offsets added at a time

// The pixels of one phase inside the image, and the kernel offsets that reach the phase.
struct Phase {
  int64_t first_row, first_column;  // in the image
  int64_t low_row, low_column;      // the same pixel on the grid
  int64_t rows, columns;            // inside the image
  std::vector<int64_t> shifts;      // one per offset
  int64_t pixels() const { return rows * columns; }
};

// Along one axis, the grid positions [low, low + count) whose pixels are inside the image, and the first such pixel.
struct Inside {
  int64_t low, count, first;
};

Inside inside(int64_t phase, int64_t stride, int64_t pad, int64_t grid, int64_t size) {
  const int64_t low = std::min(grid, phase < pad ? (pad - phase + stride - 1) / stride : 0);
  const int64_t high = std::clamp(size + pad > phase ? (size + pad - phase + stride - 1) / stride : 0, low, grid);
  return {low, high - low, low * stride + phase - pad};
}

class PixelGram final : public NormAlgorithm {
 public:
  explicit PixelGram(const Convolution& args) : a_(args), loops_(vector_loops(args.isa_limit)) {
    channels_ = a_.channels / a_.groups;
    outputs_ = a_.outputs / a_.groups;
    positions_ = a_.out_height * a_.out_width;
    grid_height_ = a_.out_height + (a_.kernel[0] - 1) * a_.dilation[0] / a_.stride[0];
    grid_width_ = a_.out_width + (a_.kernel[1] - 1) * a_.dilation[1] / a_.stride[1];
    grid_stride_ = round_up(grid_height_ * grid_width_, kLanes) + kLanes;
    find_phases();
    pixels_ = 0;
    for (const Phase& phase : phases_) pixels_ = std::max(pixels_, phase.pixels());
    packed_stride_ = packed_stride(std::max(pixels_, positions_));
    grid_end_ = (a_.out_height - 1) * grid_width_ + a_.out_width;
  }

  int64_t scratch_size() const override {
    return (b_gram_rows() + a_gram_rows()) * packed_stride_ + grid_stride_ + depth() * packed_stride_ +
           grid_height_ * grid_width_ * grid_stride_ * phase_count();
  }

  int64_t work() const override {
    int64_t pairs = positions_ * positions_ * outputs_;
    for (const Phase& phase : phases_) pairs += phase.pixels() * phase.pixels() * channels_;
    return pairs / 2 * a_.groups;
  }

  double squared_norm(int64_t sample, float* scratch) const override {
    float *b_gram = scratch, *a_gram = b_gram + b_gram_rows() * packed_stride_,
          *weights = a_gram + a_gram_rows() * packed_stride_;
    float *packed = weights + grid_stride_, *grid = packed + depth() * packed_stride_;
    double total = 0;
    for (int64_t group = 0; group < a_.groups; ++group) {
      const float* a = a_.a + sample * a_.a_strides[0] + group * channels_ * a_.a_strides[1];
      const float* b = a_.b + sample * a_.b_strides[0] + group * outputs_ * a_.b_strides[1];
      gram(b, a_.b_strides, 1, 1, {0, 0, 0, 0, a_.out_height, a_.out_width, {}}, outputs_, packed, b_gram);
      for (size_t i = 0; i < phases_.size(); ++i) {
        const Phase& phase = phases_[i];
        if (phase.pixels() == 0) continue;
        float* phase_grid = grid + static_cast<int64_t>(i) * grid_height_ * grid_width_ * grid_stride_;
        gram(a, a_.a_strides, a_.stride[0], a_.stride[1], phase, channels_, packed, a_gram);
        scatter_to_grid(phase, a_gram, phase_grid);
        total += inner_product(phase, phase_grid, b_gram, weights);
      }
    }
    return total;
  }

 private:
  int64_t b_gram_rows() const { return round_up(positions_, kTileRows); }
  int64_t a_gram_rows() const { return round_up(pixels_, kTileRows); }
  int64_t depth() const { return std::min(kDepth, std::max(channels_, outputs_)); }
  int64_t phase_count() const { return static_cast<int64_t>(phases_.size()); }

  void find_phases() {
    std::vector<int64_t> known;
    for (int64_t ky = 0; ky < a_.kernel[0]; ++ky) {
      for (int64_t kx = 0; kx < a_.kernel[1]; ++kx) {
        const int64_t y = ky * a_.dilation[0], x = kx * a_.dilation[1];
        const int64_t row = y % a_.stride[0], column = x % a_.stride[1], id = row * a_.stride[1] + column;
        auto found = std::find(known.begin(), known.end(), id);
        if (found == known.end()) {
          const Inside down = inside(row, a_.stride[0], a_.pad[0], grid_height_, a_.height);
          const Inside along = inside(column, a_.stride[1], a_.pad[1], grid_width_, a_.width);
          phases_.push_back({down.first, along.first, down.low, along.low, down.count, along.count, {}});
          found = known.insert(known.end(), id);
        }
        Phase& phase = phases_[static_cast<size_t>(found - known.begin())];
        phase.shifts.push_back(y / a_.stride[0] * grid_width_ + x / a_.stride[1]);
      }
    }
  }

  // Computes the inner products, over channels, of a phase's pixels: the upper triangle, in blocks.
  void gram(const float* x, const int64_t* strides, int64_t step_y, int64_t step_x, const Phase& phase,
            int64_t channels, float* packed, float* out) const {
    const int64_t n = phase.pixels();
    for (int64_t c = 0; c < channels; c += kDepth) {
      const int64_t depth_now = std::min(kDepth, channels - c);
      for (int64_t i = 0; i < depth_now; ++i) {
        const float* from = x + (c + i) * strides[1] + phase.first_row * strides[2] + phase.first_column * strides[3];
        for (int64_t y = 0; y < phase.rows; ++y) {
          copy_strided(from + y * step_y * strides[2], step_x * strides[3],
                       packed + i * packed_stride_ + y * phase.columns, phase.columns);
        }
      }
      for (int64_t v = 0; v < n; v += kTileWidth) {
        const int vectors = static_cast<int>(std::min(kTileVectors, (n - v + kLanes - 1) / kLanes));
        for (int64_t u = 0; u < std::min(v + kTileWidth, n); u += kTileRows) {
          loops_.multiply(vectors, {packed + u, packed_stride_, 0}, {packed + v, packed_stride_, 0}, 1, depth_now,
                          out + u * packed_stride_ + v, packed_stride_, c > 0);
        }
      }
    }
  }

  // Copies the Gram matrix of the pixels inside the image to the grid.
  void scatter_to_grid(const Phase& phase, const float* from, float* grid) const {
    for (int64_t y = 0; y < phase.rows; ++y) {
      for (int64_t x = 0; x < phase.columns; ++x) {
        const float* row = from + (y * phase.columns + x) * packed_stride_;
        float* to = grid + ((phase.low_row + y) * grid_width_ + phase.low_column + x) * grid_stride_ + phase.low_column;
        for (int64_t z = y; z < phase.rows; ++z)
          std::copy_n(row + z * phase.columns, phase.columns, to + (phase.low_row + z) * grid_width_);
      }
    }
  }

  // The sum over positions t, s of <a_t, a_s> <b_t, b_s>, computed as twice the sum over t <= s with half the diagonal.
  double inner_product(const Phase& phase, const float* grid, const float* b_gram, float* weights) const {
    double total = 0;
    for (int64_t y = 0; y < a_.out_height; ++y) {
      for (int64_t x = 0; x < a_.out_width; ++x) {
        const float* row = b_gram + (y * a_.out_width + x) * packed_stride_;
        for (int64_t z = y; z < a_.out_height; ++z)
          std::copy_n(row + z * a_.out_width, a_.out_width, weights + z * grid_width_);
        const int64_t t = y * grid_width_ + x;
        weights[t] *= 0.5f;
        const float* rows[kOffsets];
        int count = 0;
        for (const int64_t shift : phase.shifts) {
          const int64_t down = (t + shift) / grid_width_ - phase.low_row,
                        along = (t + shift) % grid_width_ - phase.low_column;
          if (down < 0 || down >= phase.rows || along < 0 || along >= phase.columns) continue;
          rows[count++] = grid + (t + shift) * grid_stride_ + shift;
          if (count < kOffsets) continue;
          total += loops_.weighted_sum(rows, count, weights, t, grid_end_);
          count = 0;
        }
        total += loops_.weighted_sum(rows, count, weights, t, grid_end_);
      }
    }
    return 2 * total;
  }

  const Convolution& a_;
  const VectorLoops& loops_;
  int64_t channels_, outputs_, positions_, pixels_;
  int64_t grid_height_, grid_width_;
  int64_t grid_end_;       // end of the last position on the grid
  int64_t grid_stride_;    // floats per row of a Gram matrix on the grid
  int64_t packed_stride_;  // floats per row of any other packed matrix
  std::vector<Phase> phases_;
};

}  // namespace

std::unique_ptr<NormAlgorithm> make_pixel_gram(const Convolution& args) { return std::make_unique<PixelGram>(args); }

}  // namespace kdfast::grad_norms
