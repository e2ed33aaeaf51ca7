// Norms from per-sample weight gradients G = sum_t b_t a_t^T: G is accumulated in register tiles, one window of
// positions at a time, and then squared.
#include <algorithm>

#include "grad_norms/algorithms.h"
#include "grad_norms/loops.h"

namespace kdfast::grad_norms {
namespace {

// With fewer channels per group, a vector spans channels and kernel offsets.
constexpr int64_t kFewChannels = kLanes;
// Maximal positions in a window: a panel of inputs then fits the L1 cache.
constexpr int64_t kWindow = 256;

// One axis of the image, and the inputs that a window of positions needs.
struct Axis {
  int64_t input, output, kernel, stride, dilation, pad;
  int64_t window = 1;  // maximal positions in a window
  int64_t skip = 1;    // distance between packed inputs

  int64_t packed() const { return (window - 1) * step() + reach() + 1; }
  int64_t step() const { return stride / skip; }  // distance between positions in packed inputs
  int64_t reach() const { return (kernel - 1) * dilation; }
  int64_t input_of(int64_t first, int64_t index) const { return first * stride - pad + index * skip; }
};

class Direct final : public NormAlgorithm {
 public:
  explicit Direct(const Convolution& args)
      : a_(args),
        y_{args.height, args.out_height, args.kernel[0], args.stride[0], args.dilation[0], args.pad[0]},
        x_{args.width, args.out_width, args.kernel[1], args.stride[1], args.dilation[1], args.pad[1]},
        loops_(vector_loops(args.isa_limit)) {
    x_.window = std::min(x_.output, kWindow);
    y_.window = std::clamp<int64_t>(kWindow / x_.window, 1, y_.output);
    if (y_.kernel == 1) y_.skip = y_.stride;
    if (x_.kernel == 1) x_.skip = x_.stride;
    channels_ = a_.channels / a_.groups;
    outputs_ = a_.outputs / a_.groups;
    offsets_ = y_.kernel * x_.kernel;
    unfold_ = channels_ < kFewChannels && offsets_ > 1;
    inputs_ = unfold_ ? channels_ * offsets_ : channels_;
    packed_stride_ = packed_stride(inputs_);
    width_ = round_up(inputs_, kLanes);
    blocks_ = (outputs_ + kTileRows - 1) / kTileRows;
    tiles_ = blocks_ * kTileRows * (unfold_ ? 1 : offsets_) * width_;
    positions_ = y_.window * x_.window;
    pixels_ = y_.packed() * x_.packed();
  }

  int64_t scratch_size() const override {
    const int64_t images =
        unfold_ ? round_up(pixels_ * channels_, kLanes) + positions_ * packed_stride_ : pixels_ * packed_stride_;
    return tiles_ + images + positions_ * blocks_ * kTileRows;
  }

  int64_t work() const override {
    return y_.output * x_.output * offsets_ * channels_ * blocks_ * kTileRows * a_.groups;
  }

  double squared_norm(int64_t sample, float* scratch) const override {
    float *tiles = scratch, *gradients = tiles + tiles_, *images = gradients + positions_ * blocks_ * kTileRows;
    double total = 0;
    for (int64_t group = 0; group < a_.groups; ++group) {
      const float* a = a_.a + sample * a_.a_strides[0] + group * channels_ * a_.a_strides[1];
      const float* b = a_.b + sample * a_.b_strides[0] + group * outputs_ * a_.b_strides[1];
      for (int64_t y = 0; y < y_.output; y += y_.window) {
        for (int64_t x = 0; x < x_.output; x += x_.window) {
          const int64_t rows = std::min(y_.window, y_.output - y), columns = std::min(x_.window, x_.output - x);
          pack_gradients(b + y * a_.b_strides[2] + x * a_.b_strides[3], rows, columns, gradients);
          pack_images(a, y, x, images);
          multiply(gradients, images, rows, columns, tiles, y + x > 0);
        }
      }
      total += loops_.sum_of_squares(tiles, tiles_);
    }
    return total;
  }

 private:
  // Layout: [block of eight outputs][position][output].
  void pack_gradients(const float* b, int64_t rows, int64_t columns, float* to) const {
    for (int64_t p = 0; p < outputs_; ++p) {
      float* lane = to + (p / kTileRows) * positions_ * kTileRows + p % kTileRows;
      for (int64_t y = 0; y < rows; ++y) {
        const float* from = b + p * a_.b_strides[1] + y * a_.b_strides[2];
        float* row = lane + y * x_.window * kTileRows;
        for (int64_t x = 0; x < columns; ++x) row[x * kTileRows] = from[x * a_.b_strides[3]];
      }
    }
  }

  // Layout: [pixel][channel], or for few channels [position][offset, channel].
  void pack_images(const float* a, int64_t y, int64_t x, float* to) const {
    if (!unfold_) return pack_pixels(a, y, x, to, packed_stride_);
    float* pixels = to + positions_ * packed_stride_;
    pack_pixels(a, y, x, pixels, channels_);
    // With a dilation of 1, the pixels under a row of the kernel are contiguous.
    const bool contiguous = x_.dilation == 1;
    const int64_t pieces = contiguous ? 1 : x_.kernel, size = contiguous ? x_.kernel * channels_ : channels_;
    for (int64_t i = 0; i < y_.window; ++i) {
      for (int64_t j = 0; j < x_.window; ++j, to += packed_stride_) {
        float* out = to;
        for (int64_t ky = 0; ky < y_.kernel; ++ky) {
          const int64_t line = (i * y_.step() + ky * y_.dilation) * x_.packed() + j * x_.step();
          for (int64_t kx = 0; kx < pieces; ++kx, out += size)
            std::copy_n(pixels + (line + kx * x_.dilation) * channels_, size, out);
        }
      }
    }
  }

  void pack_pixels(const float* a, int64_t y, int64_t x, float* to, int64_t row) const {
    const int64_t first = x_.input_of(x, 0), columns = x_.packed();
    // The packed inputs [begin, end) lie inside the image.
    const int64_t begin = std::clamp<int64_t>(first < 0 ? (-first + x_.skip - 1) / x_.skip : 0, 0, columns);
    const int64_t end = std::clamp<int64_t>((x_.input - first + x_.skip - 1) / x_.skip, begin, columns);
    for (int64_t i = 0; i < y_.packed(); ++i, to += columns * row) {
      const int64_t line = y_.input_of(y, i);
      const bool inside = line >= 0 && line < y_.input;
      for (int64_t j = 0; j < columns; ++j) {
        if (!inside || j < begin || j >= end) std::fill_n(to + j * row, channels_, 0.0f);
      }
      if (!inside) continue;
      const float* from = a + line * a_.a_strides[2] + first * a_.a_strides[3];
      const int64_t step = x_.skip * a_.a_strides[3];
      for (int64_t c = 0; c < channels_; c += kLanes) {
        const int64_t lanes = std::min<int64_t>(kLanes, channels_ - c);
        for (int64_t j = begin; j < end; ++j) {
          const float* source = from + c * a_.a_strides[1] + j * step;
          float* out = to + j * row + c;
          for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = source[lane * a_.a_strides[1]];
        }
      }
    }
  }

  void multiply(const float* gradients, const float* images, int64_t rows, int64_t columns, float* tiles,
                bool add) const {
    const int64_t kernel_rows = unfold_ ? 1 : y_.kernel, kernel_columns = unfold_ ? 1 : x_.kernel;
    const int64_t line = (unfold_ ? x_.window : x_.packed()) * packed_stride_;
    const Panel panel{images, unfold_ ? packed_stride_ : x_.step() * packed_stride_, unfold_ ? line : y_.step() * line};
    for (int64_t start = 0; start < width_; start += kTileWidth) {
      const int vectors = static_cast<int>(std::min(kTileVectors, (width_ - start) / kLanes));
      for (int64_t ky = 0; ky < kernel_rows; ++ky) {
        for (int64_t kx = 0; kx < kernel_columns; ++kx) {
          const Panel right{images + ky * y_.dilation * line + kx * x_.dilation * packed_stride_ + start, panel.step,
                            panel.row};
          for (int64_t block = 0; block < blocks_; ++block) {
            const Panel left{gradients + block * positions_ * kTileRows, kTileRows, x_.window * kTileRows};
            float* out = tiles + (((ky * kernel_columns + kx) * blocks_ + block) * kTileRows) * width_ + start;
            loops_.multiply(vectors, left, right, rows, columns, out, width_, add);
          }
        }
      }
    }
  }

  const Convolution& a_;
  Axis y_, x_;
  const VectorLoops& loops_;
  int64_t channels_, outputs_;  // per group
  int64_t offsets_;             // of the kernel
  bool unfold_;                 // whether a row of packed inputs has all offsets of a position
  int64_t inputs_, width_;      // floats in a row of packed inputs, and rounded up to vectors
  int64_t packed_stride_;       // between those rows
  int64_t blocks_;              // of eight outputs
  int64_t tiles_;               // floats in all tiles of G
  int64_t positions_, pixels_;  // packed for a window
};

}  // namespace

std::unique_ptr<NormAlgorithm> make_direct(const Convolution& args) { return std::make_unique<Direct>(args); }

}  // namespace kdfast::grad_norms
