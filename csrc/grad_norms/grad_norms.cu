// Squared norms of a convolution's per-sample weight gradients on a GPU, as one partial sum per tile and sample: the
// caller adds them in a fixed order, so that the result has the same bits every time. grad_norms.h has the formulas.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "grad_norms/grad_norms.h"

namespace kdfast::grad_norms {
namespace {

constexpr int kTile = 64;      // rows and columns of the tile of one block
constexpr int kDepth = 16;     // terms of the products that are staged in shared memory at a time
constexpr int kThreads = 256;  // each computes 4 x 4 elements of the tile
constexpr int kPerThread = 4;
constexpr int kStages =
    32;  // added before the sums move to a second set, so that their error does not grow with the depth
constexpr int64_t kMaxBlocks = 65535;

// Sizes that all blocks share; channels, outputs and inputs are per group. They fit 32 bits, since 64-bit divisions are
// several times as slow; addresses have 64 bits.
struct Sizes {
  int channels, outputs, offsets, inputs, positions, kernel_width, out_width;
};

// A position of the output: the corner of its patch, and the offset of its output gradient.
struct Position {
  bool inside;
  int64_t y, x, gradient;
};

__device__ Position position_of(const Convolution& a, const Sizes& s, int index) {
  const int row = index / s.out_width, column = index % s.out_width;
  return {index < s.positions, row * a.stride[0] - a.pad[0], column * a.stride[1] - a.pad[1],
          row * a.b_strides[2] + column * a.b_strides[3]};
}

// An element of a patch: its channel, and its offset in the kernel.
struct Element {
  bool inside;
  int64_t y, x, channel;
};

__device__ Element element_of(const Convolution& a, const Sizes& s, int index) {
  const int channel = index / s.offsets, offset = index % s.offsets;
  const int row = offset / s.kernel_width, column = offset % s.kernel_width;
  return {index < s.inputs, row * a.dilation[0], column * a.dilation[1], channel * a.a_strides[1]};
}

__device__ float input_at(const Convolution& a, const float* image, const Position& t, const Element& e) {
  const int64_t y = t.y + e.y, x = t.x + e.x;
  if (!t.inside || !e.inside || y < 0 || y >= a.height || x < 0 || x >= a.width) return 0;
  return image[e.channel + y * a.a_strides[2] + x * a.a_strides[3]];
}

__device__ float gradient_at(const Convolution& a, const Sizes& s, const float* grads, const Position& t, int output) {
  return t.inside && output < s.outputs ? grads[output * a.b_strides[1] + t.gradient] : 0;
}

struct Staging {
  float left[kDepth][kTile], right[kDepth][kTile];
};

// sums[i][j] = sum over k < depth of left(row)(k) * right(column)(k) for the thread's elements of the tile. A thread
// always stages the same row and column, so left(row) and right(column) are computed once.
template <class Left, class Right>
__device__ void multiply(Staging& staging, int depth, const Left& left, const Right& right,
                         float (&sums)[kPerThread][kPerThread]) {
  static_assert(kThreads % kTile == 0, "a thread stages one row and one column");
  const int row = threadIdx.x / (kTile / kPerThread) * kPerThread,
            column = threadIdx.x % (kTile / kPerThread) * kPerThread;
  const int lane = threadIdx.x % kTile;
  const auto my_left = left(lane);
  const auto my_right = right(lane);
  float recent[kPerThread][kPerThread] = {};
  for (int i = 0; i < kPerThread; ++i)
    for (int j = 0; j < kPerThread; ++j) sums[i][j] = 0;
  int stage = 0;
  for (int start = 0; start < depth; start += kDepth) {
    for (int k = threadIdx.x / kTile; k < kDepth; k += kThreads / kTile) {
      const bool inside = start + k < depth;
      staging.left[k][lane] = inside ? my_left(start + k) : 0;
      staging.right[k][lane] = inside ? my_right(start + k) : 0;
    }
    __syncthreads();
    for (int k = 0; k < kDepth; ++k)
      for (int i = 0; i < kPerThread; ++i)
        for (int j = 0; j < kPerThread; ++j) recent[i][j] += staging.left[k][row + i] * staging.right[k][column + j];
    __syncthreads();
    if (++stage == kStages || start + kDepth >= depth) {
      stage = 0;
      for (int i = 0; i < kPerThread; ++i) {
        for (int j = 0; j < kPerThread; ++j) {
          sums[i][j] += recent[i][j];
          recent[i][j] = 0;
        }
      }
    }
  }
}

// Returns the sum over a block in the block's first thread.
__device__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int shift = 16; shift; shift /= 2) value += __shfl_down_sync(0xffffffffu, value, shift);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (const double part : warps) total += part;
  return total;
}

// A block forms one tile of G, whose size is outputs x inputs, and squares it.
__global__ void direct(Convolution a, Sizes s, int row_tiles, int column_tiles) {
  __shared__ Staging staging;
  const int group = blockIdx.x / (row_tiles * column_tiles), tile = blockIdx.x % (row_tiles * column_tiles);
  const int row = tile / column_tiles * kTile, column = tile % column_tiles * kTile;
  for (int64_t n = blockIdx.y; n < a.batch; n += gridDim.y) {
    const float* image = a.a + n * a.a_strides[0] + static_cast<int64_t>(group) * s.channels * a.a_strides[1];
    const float* grads = a.b + n * a.b_strides[0] + static_cast<int64_t>(group) * s.outputs * a.b_strides[1];
    const auto left = [&](int i) {
      return [&, p = row + i](int t) { return gradient_at(a, s, grads, position_of(a, s, t), p); };
    };
    const auto right = [&](int j) {
      return [&, e = element_of(a, s, column + j)](int t) { return input_at(a, image, position_of(a, s, t), e); };
    };
    float sums[kPerThread][kPerThread];
    multiply(staging, s.positions, left, right, sums);
    double square = 0;
    for (int i = 0; i < kPerThread; ++i)
      for (int j = 0; j < kPerThread; ++j) square += static_cast<double>(sums[i][j]) * sums[i][j];
    square = block_sum(square);
    if (threadIdx.x == 0) a.out[n * gridDim.x + blockIdx.x] = square;
  }
}

// A block forms one tile of each Gram matrix, whose size is positions x positions, and takes their inner product. Tiles
// below the diagonal are skipped, and those above it count twice.
__global__ void gram(Convolution a, Sizes s, int tiles) {
  __shared__ Staging staging;
  const int group = blockIdx.x / (tiles * tiles), tile = blockIdx.x % (tiles * tiles);
  const int row = tile / tiles * kTile, column = tile % tiles * kTile;
  for (int64_t n = blockIdx.y; n < a.batch; n += gridDim.y) {
    double product = 0;
    if (row <= column) {
      const float* image = a.a + n * a.a_strides[0] + static_cast<int64_t>(group) * s.channels * a.a_strides[1];
      const float* grads = a.b + n * a.b_strides[0] + static_cast<int64_t>(group) * s.outputs * a.b_strides[1];
      const auto patch = [&](int first) {
        return [&, first](int i) {
          return [&, t = position_of(a, s, first + i)](int d) { return input_at(a, image, t, element_of(a, s, d)); };
        };
      };
      const auto gradient = [&](int first) {
        return [&, first](int i) {
          return [&, t = position_of(a, s, first + i)](int p) { return gradient_at(a, s, grads, t, p); };
        };
      };
      float inputs[kPerThread][kPerThread], gradients[kPerThread][kPerThread];
      multiply(staging, s.inputs, patch(row), patch(column), inputs);
      multiply(staging, s.outputs, gradient(row), gradient(column), gradients);
      for (int i = 0; i < kPerThread; ++i)
        for (int j = 0; j < kPerThread; ++j) product += static_cast<double>(inputs[i][j]) * gradients[i][j];
      product = block_sum(row == column ? product : 2 * product);
    }
    if (threadIdx.x == 0) a.out[n * gridDim.x + blockIdx.x] = product;
  }
}

// A block computes one output channel of a convolution with one input channel per group: one dot product per offset.
__global__ void depthwise(Convolution a, Sizes s) {
  const int64_t output = blockIdx.x;
  for (int64_t n = blockIdx.y; n < a.batch; n += gridDim.y) {
    const float* image = a.a + n * a.a_strides[0] + output / s.outputs * a.a_strides[1];
    const float* grads = a.b + n * a.b_strides[0] + output * a.b_strides[1];
    double square = 0;
    for (int offset = 0; offset < s.offsets; ++offset) {
      const Element element = element_of(a, s, offset);
      double sum = 0;
      for (int t = threadIdx.x; t < s.positions; t += kThreads) {
        const Position position = position_of(a, s, t);
        sum += static_cast<double>(gradient_at(a, s, grads, position, 0)) * input_at(a, image, position, element);
      }
      sum = block_sum(sum);
      square += sum * sum;
    }
    if (threadIdx.x == 0) a.out[n * gridDim.x + blockIdx.x] = square;
  }
}

constexpr int64_t kMaxInt = (int64_t{1} << 31) - 1;

int narrow(int64_t size) {
  if (size > kMaxInt - kTile) throw std::invalid_argument("convolution: a layer has too many positions or weights");
  return static_cast<int>(size);
}

Sizes sizes_of(const Convolution& a) {
  const int64_t offsets = a.kernel[0] * a.kernel[1], channels = a.channels / a.groups;
  return {narrow(channels),           narrow(a.outputs / a.groups),       narrow(offsets),
          narrow(channels * offsets), narrow(a.out_height * a.out_width), narrow(a.kernel[1]),
          narrow(a.out_width)};
}

int tiles_of(int size) { return (size + kTile - 1) / kTile; }

}  // namespace

int64_t parts(const Convolution& args) {
  const Sizes s = sizes_of(args);
  if (args.algorithm == kDepthwise) return args.outputs;
  const int64_t rows = tiles_of(args.algorithm == kGram ? s.positions : s.outputs);
  const int64_t columns = tiles_of(args.algorithm == kGram ? s.positions : s.inputs);
  return rows * columns * args.groups;
}

void squared_norms_cuda(const Convolution& args, void* stream) {
  check(args);
  if (args.batch == 0) return;
  const Sizes s = sizes_of(args);
  const int64_t tiles = parts(args);
  if (tiles > kMaxInt) throw std::invalid_argument("convolution: too many tiles for one launch");
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min(args.batch, kMaxBlocks)));
  const auto queue = static_cast<cudaStream_t>(stream);
  if (args.algorithm == kDepthwise) {
    depthwise<<<grid, kThreads, 0, queue>>>(args, s);
  } else if (args.algorithm == kGram) {
    gram<<<grid, kThreads, 0, queue>>>(args, s, tiles_of(s.positions));
  } else {
    direct<<<grid, kThreads, 0, queue>>>(args, s, tiles_of(s.outputs), tiles_of(s.inputs));
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("convolution: ") + cudaGetErrorString(error));
}

}  // namespace kdfast::grad_norms
