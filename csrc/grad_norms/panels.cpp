#include "grad_norms/panels.h"

#include <algorithm>

namespace kdfast::grad_norms {
namespace {

// With fewer channels per group, a vector spans channels and kernel offsets.
constexpr int64_t kFewChannels = kLanes;
// Maximal positions in a window: a panel of inputs then fits the L1 cache.
constexpr int64_t kWindow = 256;

}  // namespace

Panels::Panels(const Convolution& args)
    : a_(args),
      y_{args.height, args.out_height, args.kernel[0], args.stride[0], args.dilation[0], args.pad[0]},
      x_{args.width, args.out_width, args.kernel[1], args.stride[1], args.dilation[1], args.pad[1]} {
  x_.window = std::min(x_.output, kWindow);
  y_.window = std::clamp<int64_t>(kWindow / x_.window, 1, y_.output);
  if (y_.kernel == 1) y_.skip = y_.stride;
  if (x_.kernel == 1) x_.skip = x_.stride;
  channels = a_.channels / a_.groups;
  outputs = a_.outputs / a_.groups;
  const int64_t offsets = y_.kernel * x_.kernel;
  unfold = channels < kFewChannels && offsets > 1;
  kernel_rows = unfold ? 1 : y_.kernel;
  kernel_columns = unfold ? 1 : x_.kernel;
  inputs = unfold ? channels * offsets : channels;
  packed_stride_ = packed_stride(inputs);
  width = round_up(inputs, kLanes);
  blocks = (outputs + kTileRows - 1) / kTileRows;
  positions_ = y_.window * x_.window;
  pixels_ = y_.packed() * x_.packed();
}

Window Panels::window(int64_t index) const {
  const int64_t y = index / x_.windows() * y_.window, x = index % x_.windows() * x_.window;
  return {y, x, std::min(y_.window, y_.output - y), std::min(x_.window, x_.output - x)};
}

// Layout: [block of eight outputs][position][output].
void Panels::pack_gradients(int64_t sample, int64_t group, const Window& window, float* to) const {
  const float* b = a_.b + sample * a_.b_strides[0] + group * outputs * a_.b_strides[1] + window.y * a_.b_strides[2] +
                   window.x * a_.b_strides[3];
  for (int64_t p = 0; p < outputs; ++p) {
    float* lane = to + (p / kTileRows) * positions_ * kTileRows + p % kTileRows;
    for (int64_t y = 0; y < window.rows; ++y) {
      const float* from = b + p * a_.b_strides[1] + y * a_.b_strides[2];
      float* row = lane + y * x_.window * kTileRows;
      for (int64_t x = 0; x < window.columns; ++x) row[x * kTileRows] = from[x * a_.b_strides[3]];
    }
  }
}

// Layout: [pixel][channel], or for few channels [position][offset, channel].
void Panels::pack_images(int64_t sample, int64_t group, const Window& window, float* to, float* spare) const {
  const float* a = a_.a + sample * a_.a_strides[0] + group * channels * a_.a_strides[1];
  if (!unfold) return pack_pixels(a, window.y, window.x, to, packed_stride_);
  pack_pixels(a, window.y, window.x, spare, channels);
  // With a dilation of 1, the pixels under a row of the kernel are contiguous.
  const bool contiguous = x_.dilation == 1;
  const int64_t pieces = contiguous ? 1 : x_.kernel, size = contiguous ? x_.kernel * channels : channels;
  for (int64_t i = 0; i < y_.window; ++i) {
    for (int64_t j = 0; j < x_.window; ++j, to += packed_stride_) {
      float* out = to;
      for (int64_t ky = 0; ky < y_.kernel; ++ky) {
        const int64_t line = (i * y_.step() + ky * y_.dilation) * x_.packed() + j * x_.step();
        for (int64_t kx = 0; kx < pieces; ++kx, out += size)
          std::copy_n(spare + (line + kx * x_.dilation) * channels, size, out);
      }
    }
  }
}

void Panels::pack_pixels(const float* a, int64_t y, int64_t x, float* to, int64_t row) const {
  const int64_t first = x_.input_of(x, 0), columns = x_.packed();
  // The packed inputs [begin, end) lie inside the image.
  const int64_t begin = std::clamp<int64_t>(first < 0 ? (-first + x_.skip - 1) / x_.skip : 0, 0, columns);
  const int64_t end = std::clamp<int64_t>((x_.input - first + x_.skip - 1) / x_.skip, begin, columns);
  for (int64_t i = 0; i < y_.packed(); ++i, to += columns * row) {
    const int64_t line = y_.input_of(y, i);
    const bool inside = line >= 0 && line < y_.input;
    for (int64_t j = 0; j < columns; ++j) {
      if (!inside || j < begin || j >= end) std::fill_n(to + j * row, channels, 0.0f);
    }
    if (!inside) continue;
    const float* from = a + line * a_.a_strides[2] + first * a_.a_strides[3];
    const int64_t step = x_.skip * a_.a_strides[3];
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, channels - c);
      for (int64_t j = begin; j < end; ++j) {
        const float* source = from + c * a_.a_strides[1] + j * step;
        float* out = to + j * row + c;
        for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = source[lane * a_.a_strides[1]];
      }
    }
  }
}

}  // namespace kdfast::grad_norms
