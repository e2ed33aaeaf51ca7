// Squared norms of a convolution's per-sample weight gradients on a GPU, as one partial sum per tile and sample: the
// caller adds them in a fixed order, so that the result has the same bits every time. grad_norms.h has the formulas.
//
// A block multiplies two matrices that are gathered from memory: a line of either belongs to a row or column of the
// block's tile, and the depth of the product is cut into stages. While one stage is multiplied, the next is copied to
// shared memory. The address of an element is a sum of two entries of tables in shared memory, one for its line and one
// for its depth; a few threads advance the entries of the depth by counting, so that no thread divides in the loop.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "grad_norms/grad_norms.h"

namespace kdfast::grad_norms {
namespace {

constexpr int kThreads = 128;
constexpr int kMinBlocks = 4;                                            // that a multiprocessor has registers for
constexpr int kRowThreads = 8, kColumnThreads = kThreads / kRowThreads;  // how threads divide a tile
constexpr int kPerColumn = 4;                                            // columns of a thread
constexpr int kMaxPerRow = 8;                                            // rows of a thread
constexpr int kColumns = kColumnThreads * kPerColumn, kMaxRows = kRowThreads * kMaxPerRow;
constexpr int kDepth = 16;            // terms of the products in a stage
constexpr int kPitch = kColumns + 4;  // so that threads that copy along the depth use different banks
constexpr int kStages =
    32;  // added before the sums move to a second set, so that their error does not grow with the depth
constexpr int64_t kMaxBlocks = 65535;
constexpr int kOutside = 1 << 29;  // added to a coordinate, it exceeds every size

// A convolution as the blocks see it; channels, outputs and inputs are per group. Within a sample, sizes and offsets
// fit 32 bits, since 64-bit arithmetic is several times as slow.
struct Layer {
  const float *a, *b;
  double* out;
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

__device__ Element input_of(const Layer& s, const Entry& i, const Entry& j) {
  return {i.input + j.input, static_cast<unsigned>(i.y + j.y) < static_cast<unsigned>(s.size[0]) &&
                                 static_cast<unsigned>(i.x + j.x) < static_cast<unsigned>(s.size[1])};
}

__device__ Element gradient_of(const Entry& i, const Entry& j) {
  return {i.gradient + j.gradient, i.y + j.y < kOutside / 2};
}

__device__ float at(const char* source, const Element& element) {
  return *reinterpret_cast<const float*>(source + element.offset);
}

using Tile = float[kDepth][kPitch];

struct alignas(16) Staging {
  Tile left[2], right[2];
  Entry rows[kMaxRows], columns[kColumns], depth[2][kDepth];
  Counter next[kDepth], step[kDepth];  // of the first threads, whose registers a product needs
};

template <class Sequence>
__device__ void fill(Entry* entries, int size, const Sequence& sequence, int first) {
  for (int i = threadIdx.x; i < size; i += kThreads) entries[i] = sequence.entry(sequence.digits().count(first + i));
}

// Starts to copy one stage of kLines lines. Adjacent threads copy along the depth or across the lines, whichever is
// adjacent in memory.
template <int kLines, bool kAlongDepth, class Find>
__device__ void copy_stage(Tile& tile, const Entry* lines, const Entry* depth, const char* source, const Find& find) {
  static_assert(kThreads % kLines == 0 && kThreads % kDepth == 0, "threads keep their line or depth");
  // A copy after a read of shared memory waits, so a few entries are read before their copies start.
  constexpr int kBatch = 4;
  constexpr int kCopies = kLines * kDepth / kThreads;
  constexpr int kLineStep = kAlongDepth ? kThreads / kDepth : 0, kDepthStep = kAlongDepth ? 0 : kThreads / kLines;
  const int line = kAlongDepth ? threadIdx.x / kDepth : threadIdx.x % kLines;
  const int k = kAlongDepth ? threadIdx.x % kDepth : threadIdx.x / kLines;
  const Entry own = kAlongDepth ? depth[k] : lines[line];
  for (int begin = 0; begin < kCopies; begin += kBatch) {
    Element elements[kBatch];
    for (int i = 0; i < kBatch && begin + i < kCopies; ++i) {
      const Entry other = kAlongDepth ? lines[line + (begin + i) * kLineStep] : depth[k + (begin + i) * kDepthStep];
      elements[i] = find(own, other);
    }
    for (int i = 0; i < kBatch && begin + i < kCopies; ++i)
      __pipeline_memcpy_async(&tile[k + (begin + i) * kDepthStep][line + (begin + i) * kLineStep],
                              source + elements[i].offset, sizeof(float), elements[i].inside ? 0 : sizeof(float));
  }
}

// The first row and column of a thread in a tile. The threads of a warp read 4 x 8 groups, from different banks.
template <int kPerRow>
__device__ int first_row() {
  return (threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8) * kPerRow;
}

__device__ int first_column() { return (threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8) * kPerColumn; }

// Calls add(sums) with sums[i][j] = sum over k of left(row i)(k) * right(column j)(k), over up to kStages stages at a
// time, for the thread's elements of the tile.
template <int kPerRow, bool kAlongDepth, class Sequence, class Left, class Right, class Add>
__device__ void multiply(Staging& staging, const Sequence& sequence, int depth, const char* left_source,
                         const Left& find_left, const char* right_source, const Right& find_right, const Add& add) {
  const auto copy = [&](int buffer) {
    copy_stage<kRowThreads * kPerRow, kAlongDepth>(staging.left[buffer], staging.rows, staging.depth[buffer],
                                                   left_source, find_left);
    copy_stage<kColumns, kAlongDepth>(staging.right[buffer], staging.columns, staging.depth[buffer], right_source,
                                      find_right);
    __pipeline_commit();
  };
  const auto write_depth = [&](int buffer) {
    if (threadIdx.x >= kDepth) return;
    Counter& counter = staging.next[threadIdx.x];
    staging.depth[buffer][threadIdx.x] = sequence.entry(counter);
    sequence.digits().advance(counter, staging.step[threadIdx.x]);
  };
  if (threadIdx.x < kDepth) {
    staging.next[threadIdx.x] = sequence.digits().count(threadIdx.x);
    staging.step[threadIdx.x] = sequence.digits().count(kDepth);
  }
  write_depth(0);
  write_depth(1);
  __syncthreads();  // the entries have been written, and the product before this one has been computed
  copy(0);
  const int row = first_row<kPerRow>(), column = first_column();
  float sums[kPerRow][kPerColumn] = {};
  int stage = 0;
  for (int start = 0; start < depth; start += kDepth) {
    const int buffer = start / kDepth % 2;
    __pipeline_wait_prior(0);
    __syncthreads();  // the stage has arrived, and the one before has been multiplied
    if (start + kDepth < depth) copy(1 - buffer);
    write_depth(buffer);
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
      for (int i = 0; i < kPerRow; ++i)
        for (int j = 0; j < kPerColumn; ++j)
          sums[i][j] += staging.left[buffer][k][row + i] * staging.right[buffer][k][column + j];
    if (++stage == kStages || start + kDepth >= depth) {
      stage = 0;
      add(sums);
      for (int i = 0; i < kPerRow; ++i)
        for (int j = 0; j < kPerColumn; ++j) sums[i][j] = 0;
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
template <int kPerRow, bool kAlongDepth>
__global__ void __launch_bounds__(kThreads, kMinBlocks) direct(Layer s, int row_tiles, int column_tiles) {
  __shared__ Staging staging;
  const int group = blockIdx.x / (row_tiles * column_tiles), tile = blockIdx.x % (row_tiles * column_tiles);
  fill(staging.rows, kRowThreads * kPerRow, Outputs{s}, tile / column_tiles * kRowThreads * kPerRow);
  fill(staging.columns, kColumns, Elements{s}, tile % column_tiles * kColumns);
  for (int64_t n = blockIdx.y; n < s.batch; n += gridDim.y) {
    float g[kPerRow][kPerColumn] = {};
    multiply<kPerRow, kAlongDepth>(
        staging, Positions{s}, s.positions, s.gradients(n, group), gradient_of, s.image(n, group),
        [&](const Entry& i, const Entry& j) { return input_of(s, i, j); },
        [&](const float (&sums)[kPerRow][kPerColumn]) {
          for (int i = 0; i < kPerRow; ++i)
            for (int j = 0; j < kPerColumn; ++j) g[i][j] += sums[i][j];
        });
    double square = 0;
    for (int i = 0; i < kPerRow; ++i)
      for (int j = 0; j < kPerColumn; ++j) square += static_cast<double>(g[i][j]) * g[i][j];
    square = block_sum(square);
    if (threadIdx.x == 0) s.out[n * gridDim.x + blockIdx.x] = square;
  }
}

// A block forms one tile of each Gram matrix, whose size is positions x positions, and takes their inner product. Tiles
// below the diagonal are skipped, and those above it count twice.
template <bool kAlongDepth>
__global__ void __launch_bounds__(kThreads, kMinBlocks) gram(Layer s, int tiles) {
  static_assert(kMaxRows == kColumns, "tiles are symmetric");
  using Sums = float[kMaxPerRow][kPerColumn];
  __shared__ Staging staging;
  __shared__ float inputs[kMaxPerRow * kPerColumn][kThreads];  // each thread's own, which would not fit its registers
  const int group = blockIdx.x / (tiles * tiles), tile = blockIdx.x % (tiles * tiles);
  const int row = tile / tiles, column = tile % tiles;
  fill(staging.rows, kMaxRows, Positions{s}, row * kMaxRows);
  fill(staging.columns, kColumns, Positions{s}, column * kColumns);
  for (int64_t n = blockIdx.y; n < s.batch; n += gridDim.y) {
    double product = 0;
    if (row <= column) {
      for (int i = 0; i < kMaxPerRow * kPerColumn; ++i) inputs[i][threadIdx.x] = 0;
      const auto find_input = [&](const Entry& i, const Entry& j) { return input_of(s, i, j); };
      const auto keep = [&](const Sums& sums) {
        for (int i = 0; i < kMaxPerRow; ++i)
          for (int j = 0; j < kPerColumn; ++j) inputs[i * kPerColumn + j][threadIdx.x] += sums[i][j];
      };
      const auto accumulate = [&](const Sums& sums) {
        for (int i = 0; i < kMaxPerRow; ++i)
          for (int j = 0; j < kPerColumn; ++j)
            product += static_cast<double>(inputs[i * kPerColumn + j][threadIdx.x]) * sums[i][j];
      };
      const char* image = s.image(n, group);
      multiply<kMaxPerRow, kAlongDepth>(staging, Elements{s}, s.inputs, image, find_input, image, find_input, keep);
      const char* gradients = s.gradients(n, group);
      multiply<kMaxPerRow, kAlongDepth>(staging, Outputs{s}, s.outputs, gradients, gradient_of, gradients, gradient_of,
                                        accumulate);
      product = block_sum(row == column ? product : 2 * product);
    }
    if (threadIdx.x == 0) s.out[n * gridDim.x + blockIdx.x] = product;
  }
}

// A block computes one output channel of a convolution with one input channel per group: one dot product per offset.
__global__ void __launch_bounds__(kThreads, kMinBlocks) depthwise(Layer s) {
  const int group = blockIdx.x / s.outputs;
  const Positions positions{s};
  const Elements elements{s};
  const Digits digits = positions.digits();
  const Counter first = digits.count(threadIdx.x), step = digits.count(kThreads);
  const Entry output = Outputs{s}.entry({static_cast<int>(blockIdx.x) % s.outputs, 0, 0, 0});
  for (int64_t n = blockIdx.y; n < s.batch; n += gridDim.y) {
    const char *image = s.image(n, group), *gradients = s.gradients(n, group);
    double square = 0;
    for (int offset = 0; offset < s.offsets; ++offset) {
      const Entry element = elements.entry(elements.digits().count(offset));
      double sum = 0;
      for (Counter t = first; t.index < s.positions; digits.advance(t, step)) {
        const Entry position = positions.entry(t);
        const Element input = input_of(s, position, element);
        if (input.inside) sum += static_cast<double>(at(gradients, gradient_of(position, output))) * at(image, input);
      }
      sum = block_sum(sum);
      square += sum * sum;
    }
    if (threadIdx.x == 0) s.out[n * gridDim.x + blockIdx.x] = square;
  }
}

constexpr int64_t kBytes = sizeof(float);
constexpr int64_t kMaxOffset = (int64_t{1} << 32) - 1;
constexpr int64_t kMaxInt = (int64_t{1} << 31) - 1;

int narrow(int64_t size) {
  if (size > kMaxInt - kThreads) throw std::invalid_argument("convolution: a layer has too many positions or weights");
  return static_cast<int>(size);
}

// Strides of channels, rows and columns of a sample in bytes; the offsets of its elements must fit 32 bits.
void narrow_strides(const int64_t* strides, int64_t channels, int64_t height, int64_t width, uint32_t* out) {
  const int64_t last = (channels - 1) * strides[1] + (height - 1) * strides[2] + (width - 1) * strides[3];
  if (last * kBytes > kMaxOffset)
    throw std::invalid_argument("convolution: the inputs or output gradients of a sample span more than 4 GiB");
  for (int i = 0; i < 3; ++i) out[i] = static_cast<uint32_t>(strides[i + 1] * kBytes);
}

Layer make_layer(const Convolution& a) {
  Layer s{};
  const int64_t offsets = a.kernel[0] * a.kernel[1], channels = a.channels / a.groups, outputs = a.outputs / a.groups;
  s.a = a.a;
  s.b = a.b;
  s.out = a.out;
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

int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

// Rows per thread of a tile of G: few outputs need low tiles.
int rows_per_thread(const Layer& s) {
  int rows = 2;
  while (rows < kMaxPerRow && rows * kRowThreads < s.outputs) rows *= 2;
  return rows;
}

template <int kPerRow>
auto direct_kernel(const Layer& s) {
  return s.channels_last ? direct<kPerRow, false> : direct<kPerRow, true>;
}

}  // namespace

int64_t parts(const Convolution& args) {
  const Layer s = make_layer(args);
  if (args.algorithm == kDepthwise) return args.outputs;
  const bool is_gram = args.algorithm == kGram;
  const int64_t rows =
      is_gram ? tiles_of(s.positions, kMaxRows) : tiles_of(s.outputs, kRowThreads * rows_per_thread(s));
  return rows * tiles_of(is_gram ? s.positions : s.inputs, kColumns) * args.groups;
}

void squared_norms_cuda(const Convolution& args, void* stream) {
  check(args);
  if (args.batch == 0) return;
  const Layer s = make_layer(args);
  const int64_t tiles = parts(args);
  if (tiles > kMaxInt) throw std::invalid_argument("convolution: too many tiles for one launch");
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min(args.batch, kMaxBlocks)));
  const auto queue = static_cast<cudaStream_t>(stream);
  if (args.algorithm == kDepthwise) {
    depthwise<<<grid, kThreads, 0, queue>>>(s);
  } else if (args.algorithm == kGram) {
    const auto kernel = s.channels_last ? gram<true> : gram<false>;
    kernel<<<grid, kThreads, 0, queue>>>(s, tiles_of(s.positions, kMaxRows));
  } else {
    const int rows = rows_per_thread(s);
    const auto kernel = rows == 2 ? direct_kernel<2>(s) : rows == 4 ? direct_kernel<4>(s) : direct_kernel<8>(s);
    kernel<<<grid, kThreads, 0, queue>>>(s, tiles_of(s.outputs, kRowThreads * rows), tiles_of(s.inputs, kColumns));
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("convolution: ") + cudaGetErrorString(error));
}

}  // namespace kdfast::grad_norms
