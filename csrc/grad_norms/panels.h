// The operands of G = sum_t b_t a_t^T for the register tiles, packed one window of positions at a time.
#pragma once

#include <cstdint>

#include "grad_norms/grad_norms.h"
#include "grad_norms/loops.h"

namespace kdfast::grad_norms {

// One axis of the image, and the inputs that a window of positions needs.
struct Axis {
  int64_t input, output, kernel, stride, dilation, pad;
  int64_t window = 1;  // maximal positions in a window
  int64_t skip = 1;    // distance between packed inputs

  int64_t windows() const { return (output + window - 1) / window; }
  int64_t packed() const { return (window - 1) * step() + reach() + 1; }
  int64_t step() const { return stride / skip; }  // distance between positions in packed inputs
  int64_t reach() const { return (kernel - 1) * dilation; }
  int64_t input_of(int64_t first, int64_t index) const { return first * stride - pad + index * skip; }
};

// The first position of a window, and the number of its rows and columns.
struct Window {
  int64_t y, x, rows, columns;
};

class Panels {
 public:
  explicit Panels(const Convolution& args);

  int64_t channels, outputs;            // per group
  bool unfold;                          // whether a row of packed inputs has all offsets of a position
  int64_t kernel_rows, kernel_columns;  // offsets outside these rows
  int64_t inputs, width;                // floats in a row of packed inputs, and rounded up to vectors
  int64_t blocks;                       // of eight outputs

  int64_t windows() const { return y_.windows() * x_.windows(); }
  Window window(int64_t index) const;

  // Floats of a packed window; packing images uses `spare` ones beside. What packing does not write must be zero.
  int64_t gradients_size() const { return positions_ * blocks * kTileRows; }
  int64_t images_size() const { return (unfold ? positions_ : pixels_) * packed_stride_; }
  int64_t spare_size() const { return unfold ? round_up(pixels_ * channels, kLanes) : 0; }
  void pack_gradients(int64_t sample, int64_t group, const Window& window, float* to) const;
  void pack_images(int64_t sample, int64_t group, const Window& window, float* to, float* spare) const;

  // The operands of a tile of G: a block of outputs, and the inputs from `start` at an offset.
  Panel left(const float* gradients, int64_t block) const {
    return {gradients + block * positions_ * kTileRows, kTileRows, x_.window * kTileRows};
  }
  Panel right(const float* images, int64_t ky, int64_t kx, int64_t start) const {
    const int64_t line = (unfold ? x_.window : x_.packed()) * packed_stride_;
    return {images + ky * y_.dilation * line + kx * x_.dilation * packed_stride_ + start,
            unfold ? packed_stride_ : x_.step() * packed_stride_, unfold ? line : y_.step() * line};
  }

 private:
  void pack_pixels(const float* a, int64_t y, int64_t x, float* to, int64_t row) const;

  const Convolution& a_;
  Axis y_, x_;
  int64_t packed_stride_;       // between rows of packed inputs
  int64_t positions_, pixels_;  // packed for a window
};

}  // namespace kdfast::grad_norms
