// A convolution as the blocks of a GPU see it, and where the elements of its operands are in memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "grad_norms/grad_norms.h"

namespace kdfast::grad_norms {

constexpr int kOutside = 1 << 29;  // added to a coordinate, it exceeds every size

// A convolution as the blocks see it; channels, outputs and inputs are per group. Within a sample, sizes and offsets
// fit 32 bits, since 64-bit arithmetic is several times as slow.
struct Layer {
  const float *a, *b, *weights;
  double *squares, *out;
  int64_t weight_size;
  int64_t batch, a_sample, b_sample, a_group, b_group;  // strides of samples and groups
  int channels, outputs, offsets, inputs, positions, out_width;
  int size[2], kernel[2], stride[2], dilation[2], pad[2];
  uint32_t a_strides[3], b_strides[3];  // in bytes, of channels or outputs, rows and columns
  bool channels_last;

  __device__ const char* image(int64_t sample, int group) const {
    return reinterpret_cast<const char*>(a + sample * a_sample + group * a_group);
  }
  __device__ const char* gradients(int64_t sample, int group) const {
    return reinterpret_cast<const char*>(b + sample * b_sample + group * b_group);
  }
};

// What a position, an element of a patch or an output adds to offsets and coordinates. Offsets are modulo 2^32, since
// those of a position or an element alone can be negative.
struct alignas(16) Entry {
  uint32_t input;
  int x, y;
  uint32_t gradient;
};

// An index and its three digits.
struct Counter {
  int index, high, middle, low;
};

// Number systems, in which a counter advances without divisions.
struct Digits {
  int middle_size, low_size;

  __device__ Counter count(int index) const {
    const int rest = index / low_size;
    return {index, rest / middle_size, rest % middle_size, index % low_size};
  }
  __device__ void advance(Counter& counter, const Counter& step) const {
    counter.index += step.index;
    counter.low += step.low;
    counter.middle += step.middle;
    counter.high += step.high;
    if (counter.low >= low_size) counter.low -= low_size, ++counter.middle;
    if (counter.middle >= middle_size) counter.middle -= middle_size, ++counter.high;
  }
};

constexpr int kUnlimited = 0x7fffffff;

// Positions of the output: where the patch begins, and the output gradient.
struct Positions {
  const Layer& s;
  __device__ Digits digits() const { return {kUnlimited, s.out_width}; }
  __device__ Entry entry(const Counter& c) const {
    const int y = c.middle * s.stride[0] - s.pad[0], x = c.low * s.stride[1] - s.pad[1];
    return {y * s.a_strides[1] + x * s.a_strides[2], x, c.index < s.positions ? y : kOutside,
            c.middle * s.b_strides[1] + c.low * s.b_strides[2]};
  }
};

// Elements of a patch, those that are adjacent in memory first.
struct Elements {
  const Layer& s;
  __device__ Digits digits() const {
    return s.channels_last ? Digits{s.kernel[1], s.channels} : Digits{s.kernel[0], s.kernel[1]};
  }
  __device__ Entry entry(const Counter& c) const {
    const int channel = s.channels_last ? c.low : c.high;
    const int y = (s.channels_last ? c.high : c.middle) * s.dilation[0];
    const int x = (s.channels_last ? c.middle : c.low) * s.dilation[1];
    return {channel * s.a_strides[0] + y * s.a_strides[1] + x * s.a_strides[2], x, c.index < s.inputs ? y : kOutside,
            0};
  }
};

struct Outputs {
  const Layer& s;
  __device__ Digits digits() const { return {kUnlimited, kUnlimited}; }
  __device__ Entry entry(const Counter& c) const {
    return {0, 0, c.index < s.outputs ? 0 : kOutside, c.index * s.b_strides[0]};
  }
};

// Element i, j of a matrix of inputs or output gradients: its offset in bytes, and whether it exists. Others are 0.
struct Element {
  uint32_t offset;
  bool inside;
};

__device__ inline Element input_of(const Layer& s, const Entry& i, const Entry& j) {
  return {i.input + j.input, static_cast<unsigned>(i.y + j.y) < static_cast<unsigned>(s.size[0]) &&
                                 static_cast<unsigned>(i.x + j.x) < static_cast<unsigned>(s.size[1])};
}

__device__ inline Element gradient_of(const Entry& i, const Entry& j) {
  return {i.gradient + j.gradient, i.y + j.y < kOutside / 2};
}

constexpr int64_t kBytes = sizeof(float);
constexpr int64_t kMaxOffset = (int64_t{1} << 32) - 1;
constexpr int64_t kMaxInt = (int64_t{1} << 31) - 1;
constexpr int kMargin = 128;  // by which a counter may run beyond the end

inline int narrow(int64_t size) {
  if (size > kMaxInt - kMargin) throw std::invalid_argument("convolution: a layer has too many positions or weights");
  return static_cast<int>(size);
}

// Strides of channels, rows and columns of a sample in bytes; the offsets of its elements must fit 32 bits.
inline void narrow_strides(const int64_t* strides, int64_t channels, int64_t height, int64_t width, uint32_t* out) {
  const int64_t last = (channels - 1) * strides[1] + (height - 1) * strides[2] + (width - 1) * strides[3];
  if (last * kBytes > kMaxOffset)
    throw std::invalid_argument("convolution: the inputs or output gradients of a sample span more than 4 GiB");
  for (int i = 0; i < 3; ++i) out[i] = static_cast<uint32_t>(strides[i + 1] * kBytes);
}

inline Layer make_layer(const Convolution& a) {
  Layer s{};
  const int64_t offsets = a.kernel[0] * a.kernel[1], channels = a.channels / a.groups, outputs = a.outputs / a.groups;
  s.a = a.a;
  s.b = a.b;
  s.weights = a.weights;
  s.squares = a.squares;
  s.out = a.out;
  s.weight_size = a.outputs * channels * offsets;
  s.batch = a.batch;
  s.a_sample = a.a_strides[0];
  s.b_sample = a.b_strides[0];
  s.a_group = channels * a.a_strides[1];
  s.b_group = outputs * a.b_strides[1];
  s.channels = narrow(channels);
  s.outputs = narrow(outputs);
  s.offsets = narrow(offsets);
  s.inputs = narrow(channels * offsets);
  s.positions = narrow(a.out_height * a.out_width);
  s.out_width = narrow(a.out_width);
  const int64_t size[2] = {a.height, a.width}, out_size[2] = {a.out_height, a.out_width};
  for (int i = 0; i < 2; ++i) {
    const int64_t end = std::max(size[i], out_size[i] * a.stride[i] + a.kernel[i] * a.dilation[i]) + a.pad[i];
    if (end >= kOutside / 2) throw std::invalid_argument("convolution: an image is too high or too wide");
    s.size[i] = static_cast<int>(size[i]);
    s.kernel[i] = static_cast<int>(a.kernel[i]);
    s.stride[i] = static_cast<int>(a.stride[i]);
    s.dilation[i] = static_cast<int>(a.dilation[i]);
    s.pad[i] = static_cast<int>(a.pad[i]);
  }
  narrow_strides(a.a_strides, channels, a.height, a.width, s.a_strides);
  narrow_strides(a.b_strides, outputs, a.out_height, a.out_width, s.b_strides);
  s.channels_last = a.a_strides[1] < a.a_strides[3];
  return s;
}

}  // namespace kdfast::grad_norms
