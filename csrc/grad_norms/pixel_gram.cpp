// Norms from Gram matrices of pixels: with G = sum_t b_t a_t^T over positions, ||G||^2 = sum_{t, s} <b_t, b_s> <a_t,
// a_s>, and <a_t, a_s> = sum over the kernel's offsets o of <pixel(t, o), pixel(s, o)>.
//
// Pixels are sorted by phase, their padded coordinates modulo the stride: one offset reaches one phase. Within a phase
// of `wide` columns, position (y, x) sees through an offset the pixel at y * wide + x + shift: the Gram matrix of a
// phase is laid out on that grid, with zeros for padding, so that an offset is a shift of both its indices.
#include <algorithm>
#include <vector>

#include "grad_norms/algorithms.h"
#include "grad_norms/loops.h"

namespace kdfast {
namespace {

// Channels multiplied in one go: the first-level cache holds a panel of them.
constexpr int64_t kDepth = 128;
// Offsets added up at once.
constexpr int kOffsets = 16;

// The pixels of one phase that lie inside the image, and the offsets that reach the phase.
struct Phase {
  int64_t first_row, first_column;  // of the image
  int64_t low_row, low_column;      // where these lie on the grid
  int64_t rows, columns;            // inside the image
  std::vector<int64_t> shifts;      // of the offsets
  int64_t pixels() const { return rows * columns; }
};

// Along one axis: the padded coordinates s * q + r of the positions q of a grid that lie in the image.
struct Inside {
  int64_t low, count, first;
};

Inside inside(int64_t phase, int64_t stride, int64_t pad, int64_t grid, int64_t size) {
  const int64_t low = std::min(grid, phase < pad ? (pad - phase + stride - 1) / stride : 0);
  const int64_t high = std::clamp(size + pad > phase ? (size + pad - phase + stride - 1) / stride : 0, low, grid);
  return {low, high - low, low * stride + phase - pad};
}

class Pixel final : public GhostWay {
 public:
  explicit Pixel(const GhostConv& args) : a_(args), kernels_(ghost_kernels(args.isa_limit)) {
    channels_ = a_.channels / a_.groups;
    outputs_ = a_.outputs / a_.groups;
    positions_ = a_.out_height * a_.out_width;
    high_ = a_.out_height + (a_.kernel[0] - 1) * a_.dilation[0] / a_.stride[0];
    wide_ = a_.out_width + (a_.kernel[1] - 1) * a_.dilation[1] / a_.stride[1];
    grid_row_ = round_up(high_ * wide_, kLanes) + kLanes;
    find_phases();
    pixels_ = 0;
    for (const Phase& phase : phases_) pixels_ = std::max(pixels_, phase.pixels());
    line_ = packed_row(std::max(pixels_, positions_));
    end_ = (a_.out_height - 1) * wide_ + a_.out_width;
  }

  int64_t scratch() const override {
    return (grams() + count()) * line_ + grid_row_ + depth() * line_ + high_ * wide_ * grid_row_ * count_phases();
  }

  int64_t work() const override {
    int64_t pairs = positions_ * positions_ * outputs_;
    for (const Phase& phase : phases_) pairs += phase.pixels() * phase.pixels() * channels_;
    return pairs / 2 * a_.groups;
  }

  double square(int64_t sample, float* scratch) const override {
    float *b_gram = scratch, *a_gram = b_gram + grams() * line_, *weights = a_gram + count() * line_;
    float *packed = weights + grid_row_, *grid = packed + depth() * line_;
    double total = 0;
    for (int64_t group = 0; group < a_.groups; ++group) {
      const float* a = a_.a + sample * a_.a_strides[0] + group * channels_ * a_.a_strides[1];
      const float* b = a_.b + sample * a_.b_strides[0] + group * outputs_ * a_.b_strides[1];
      gram(b, a_.b_strides, 1, 1, {0, 0, 0, 0, a_.out_height, a_.out_width, {}}, outputs_, packed, b_gram);
      for (size_t i = 0; i < phases_.size(); ++i) {
        const Phase& phase = phases_[i];
        if (phase.pixels() == 0) continue;
        float* mine = grid + static_cast<int64_t>(i) * high_ * wide_ * grid_row_;
        gram(a, a_.a_strides, a_.stride[0], a_.stride[1], phase, channels_, packed, a_gram);
        spread(phase, a_gram, mine);
        total += product(phase, mine, b_gram, weights);
      }
    }
    return total;
  }

 private:
  int64_t grams() const { return round_up(positions_, kTileRows); }
  int64_t count() const { return round_up(pixels_, kTileRows); }
  int64_t depth() const { return std::min(kDepth, std::max(channels_, outputs_)); }
  int64_t count_phases() const { return static_cast<int64_t>(phases_.size()); }

  void find_phases() {
    std::vector<int64_t> known;
    for (int64_t ky = 0; ky < a_.kernel[0]; ++ky) {
      for (int64_t kx = 0; kx < a_.kernel[1]; ++kx) {
        const int64_t y = ky * a_.dilation[0], x = kx * a_.dilation[1];
        const int64_t row = y % a_.stride[0], column = x % a_.stride[1], name = row * a_.stride[1] + column;
        auto found = std::find(known.begin(), known.end(), name);
        if (found == known.end()) {
          const Inside down = inside(row, a_.stride[0], a_.pad[0], high_, a_.height);
          const Inside along = inside(column, a_.stride[1], a_.pad[1], wide_, a_.width);
          phases_.push_back({down.first, along.first, down.low, along.low, down.count, along.count, {}});
          found = known.insert(known.end(), name);
        }
        Phase& phase = phases_[static_cast<size_t>(found - known.begin())];
        phase.shifts.push_back(y / a_.stride[0] * wide_ + x / a_.stride[1]);
      }
    }
  }

  // The upper triangle, in blocks, of the inner products over channels of a phase's pixels.
  void gram(const float* x, const int64_t* strides, int64_t step_y, int64_t step_x, const Phase& phase,
            int64_t channels, float* packed, float* out) const {
    const int64_t n = phase.pixels();
    for (int64_t c = 0; c < channels; c += kDepth) {
      const int64_t deep = std::min(kDepth, channels - c);
      for (int64_t i = 0; i < deep; ++i) {
        const float* from = x + (c + i) * strides[1] + phase.first_row * strides[2] + phase.first_column * strides[3];
        for (int64_t y = 0; y < phase.rows; ++y) {
          copy_strided(from + y * step_y * strides[2], step_x * strides[3], packed + i * line_ + y * phase.columns,
                       phase.columns);
        }
      }
      for (int64_t v = 0; v < n; v += kTileWidth) {
        const int vectors = static_cast<int>(std::min(kTileVectors, (n - v + kLanes - 1) / kLanes));
        for (int64_t u = 0; u < std::min(v + kTileWidth, n); u += kTileRows) {
          kernels_.multiply(vectors, {packed + u, line_, 0}, {packed + v, line_, 0}, 1, deep, out + u * line_ + v,
                            line_, c > 0);
        }
      }
    }
  }

  // From pixels inside the image to the grid.
  void spread(const Phase& phase, const float* from, float* grid) const {
    for (int64_t y = 0; y < phase.rows; ++y) {
      for (int64_t x = 0; x < phase.columns; ++x) {
        const float* row = from + (y * phase.columns + x) * line_;
        float* to = grid + ((phase.low_row + y) * wide_ + phase.low_column + x) * grid_row_ + phase.low_column;
        for (int64_t z = y; z < phase.rows; ++z)
          std::copy_n(row + z * phase.columns, phase.columns, to + (phase.low_row + z) * wide_);
      }
    }
  }

  // Over pairs of positions t <= s, those with t < s counted twice.
  double product(const Phase& phase, const float* grid, const float* b_gram, float* weights) const {
    double total = 0;
    for (int64_t y = 0; y < a_.out_height; ++y) {
      for (int64_t x = 0; x < a_.out_width; ++x) {
        const float* row = b_gram + (y * a_.out_width + x) * line_;
        for (int64_t z = y; z < a_.out_height; ++z)
          std::copy_n(row + z * a_.out_width, a_.out_width, weights + z * wide_);
        const int64_t t = y * wide_ + x;
        weights[t] *= 0.5f;
        const float* rows[kOffsets];
        int count = 0;
        for (const int64_t shift : phase.shifts) {
          const int64_t down = (t + shift) / wide_ - phase.low_row, along = (t + shift) % wide_ - phase.low_column;
          if (down < 0 || down >= phase.rows || along < 0 || along >= phase.columns) continue;
          rows[count++] = grid + (t + shift) * grid_row_ + shift;
          if (count < kOffsets) continue;
          total += kernels_.weighted(rows, count, weights, t, end_);
          count = 0;
        }
        total += kernels_.weighted(rows, count, weights, t, end_);
      }
    }
    return 2 * total;
  }

  const GhostConv& a_;
  const GhostKernels& kernels_;
  int64_t channels_, outputs_, positions_, pixels_;
  int64_t high_, wide_, end_;  // of the grid; where its last position ends
  int64_t grid_row_, line_;    // floats a row of the Gram matrix on the grid, and of packed ones
  std::vector<Phase> phases_;
};

}  // namespace

std::unique_ptr<GhostWay> ghost_pixel(const GhostConv& args) { return std::make_unique<Pixel>(args); }

}  // namespace kdfast
