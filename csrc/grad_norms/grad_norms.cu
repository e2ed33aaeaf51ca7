// Functions of a convolution's per-sample weight gradients on a GPU, as partial sums: the caller adds them in a fixed
// order, so that the result has the same bits every time. grad_norms.h has the formulas.
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

#include "grad_norms/gpu_layer.h"
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
constexpr int64_t kMaxBlocks = 65535;  // of the samples
static_assert(kThreads <= kMargin, "no thread counts beyond the margin");
// What needs the elements of G: blocks that a launch aims at, each of which takes several samples in turn.
constexpr int64_t kElementBlocks = 4096;
constexpr int64_t kSumBlocks = 1024;  // of tiles that are kept, in 32 KiB each
constexpr int kMaxAdded = 32;         // squares that are added in float

// What is computed from the elements of G: the sum of the squares, also with weights, or the squares' sums over
// samples.
enum class Use { kNorm, kWeightedNorm, kSquares };

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

// A block's tile of G, whose size is outputs x inputs.
template <int kPerRow>
struct DirectTile {
  int group, row, column;

  __device__ DirectTile(int row_tiles, int column_tiles) {
    const int tile = blockIdx.x % (row_tiles * column_tiles);
    group = blockIdx.x / (row_tiles * column_tiles);
    row = tile / column_tiles * kRowThreads * kPerRow;
    column = tile % column_tiles * kColumns;
  }
  __device__ void fill_lines(Staging& staging, const Layer& s) const {
    fill(staging.rows, kRowThreads * kPerRow, Outputs{s}, row);
    fill(staging.columns, kColumns, Elements{s}, column);
  }
  // Adds the thread's elements of the tile of a sample.
  template <bool kAlongDepth>
  __device__ void form(Staging& staging, const Layer& s, int64_t sample, float (&g)[kPerRow][kPerColumn]) const {
    multiply<kPerRow, kAlongDepth>(
        staging, Positions{s}, s.positions, s.gradients(sample, group), gradient_of, s.image(sample, group),
        [&](const Entry& i, const Entry& j) { return input_of(s, i, j); },
        [&](const float (&sums)[kPerRow][kPerColumn]) {
          for (int i = 0; i < kPerRow; ++i)
            for (int j = 0; j < kPerColumn; ++j) g[i][j] += sums[i][j];
        });
  }
  // Calls visit(index, index in the weight) for the thread's elements that exist.
  template <class Visit>
  __device__ void for_each_element(const Layer& s, const Visit& visit) const {
#pragma unroll 1  // unrolled, it would keep more indices than a thread has registers
    for (int i = 0; i < kPerRow * kPerColumn; ++i) {
      const int r = row + first_row<kPerRow>() + i / kPerColumn, c = column + first_column() + i % kPerColumn;
      const int input = s.channels_last ? c % s.channels * s.offsets + c / s.channels : c;
      if (r < s.outputs && c < s.inputs) visit(i, (static_cast<int64_t>(group) * s.outputs + r) * s.inputs + input);
    }
  }
};

// A block forms one tile of G and squares it.
template <int kPerRow, bool kAlongDepth>
__global__ void __launch_bounds__(kThreads, kMinBlocks) direct(Layer s, int row_tiles, int column_tiles) {
  __shared__ Staging staging;
  const DirectTile<kPerRow> tile(row_tiles, column_tiles);
  tile.fill_lines(staging, s);
  for (int64_t n = blockIdx.y; n < s.batch; n += gridDim.y) {
    float g[kPerRow][kPerColumn] = {};
    tile.template form<kAlongDepth>(staging, s, n, g);
    double square = 0;
    for (int i = 0; i < kPerRow; ++i)
      for (int j = 0; j < kPerColumn; ++j) square += static_cast<double>(g[i][j]) * g[i][j];
    square = block_sum(square);
    if (threadIdx.x == 0) s.out[n * gridDim.x + blockIdx.x] = square;
  }
}

// A block forms one tile of G for several samples, and either squares it with weights or adds its squares.
template <int kPerRow, bool kAlongDepth, Use kUse>
__global__ void __launch_bounds__(kThreads, kMinBlocks) direct_elements(Layer s, int row_tiles, int column_tiles) {
  __shared__ Staging staging;
  __shared__ float kept[kPerRow * kPerColumn][kThreads];  // each thread's own weights or sums of squares
  const DirectTile<kPerRow> tile(row_tiles, column_tiles);
  tile.fill_lines(staging, s);
  const auto clear = [&] {
    for (int i = 0; i < kPerRow * kPerColumn; ++i) kept[i][threadIdx.x] = 0;
  };
  clear();
  if constexpr (kUse == Use::kWeightedNorm)
    tile.for_each_element(s, [&](int i, int64_t at) { kept[i][threadIdx.x] = s.weights[at]; });
  [[maybe_unused]] int added = 0;
  for (int64_t n = blockIdx.y; n < s.batch; n += gridDim.y) {
    float g[kPerRow][kPerColumn] = {};
    tile.template form<kAlongDepth>(staging, s, n, g);
    if constexpr (kUse == Use::kWeightedNorm) {
      double square = 0;
      for (int i = 0; i < kPerRow; ++i)
        for (int j = 0; j < kPerColumn; ++j)
          square += static_cast<double>(g[i][j]) * g[i][j] * kept[i * kPerColumn + j][threadIdx.x];
      square = block_sum(square);
      if (threadIdx.x == 0) s.out[n * gridDim.x + blockIdx.x] = square;
    } else {
      for (int i = 0; i < kPerRow; ++i)
        for (int j = 0; j < kPerColumn; ++j) kept[i * kPerColumn + j][threadIdx.x] += g[i][j] * g[i][j];
      if (++added < kMaxAdded && n + gridDim.y < s.batch) continue;
      double* squares = s.squares + blockIdx.y * s.weight_size;
      tile.for_each_element(s, [&](int i, int64_t at) { squares[at] += kept[i][threadIdx.x]; });
      clear();
      added = 0;
    }
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
template <Use kUse>
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
      if (kUse == Use::kNorm) square += sum * sum;
      if (kUse == Use::kNorm || threadIdx.x) continue;
      const int64_t at = static_cast<int64_t>(blockIdx.x) * s.offsets + offset;
      if (kUse == Use::kWeightedNorm) square += sum * sum * s.weights[at];
      if (kUse == Use::kSquares) s.squares[blockIdx.y * s.weight_size + at] += sum * sum;
    }
    if (kUse != Use::kSquares && threadIdx.x == 0) s.out[n * gridDim.x + blockIdx.x] = square;
  }
}

int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

// Rows per thread of a tile of G: few outputs need low tiles.
int rows_per_thread(const Layer& s) {
  int rows = 2;
  while (rows < kMaxPerRow && rows * kRowThreads < s.outputs) rows *= 2;
  return rows;
}

using DirectKernel = void (*)(Layer, int, int);

template <int kPerRow, bool kAlongDepth>
DirectKernel direct_kernel(const Layer& s) {
  if (s.weights) return direct_elements<kPerRow, kAlongDepth, Use::kWeightedNorm>;
  if (s.squares) return direct_elements<kPerRow, kAlongDepth, Use::kSquares>;
  return direct<kPerRow, kAlongDepth>;
}

template <int kPerRow>
DirectKernel direct_kernel(const Layer& s) {
  return s.channels_last ? direct_kernel<kPerRow, false>(s) : direct_kernel<kPerRow, true>(s);
}

void (*depthwise_kernel(const Layer& s))(Layer) {
  if (s.weights) return depthwise<Use::kWeightedNorm>;
  return s.squares ? depthwise<Use::kSquares> : depthwise<Use::kNorm>;
}

// Blocks that share the samples of a tile, if there are about `blocks` for all tiles.
int64_t blocks_per_tile(const Convolution& args, int64_t tiles, int64_t blocks) {
  return std::clamp<int64_t>((blocks + tiles - 1) / tiles, 1, std::max<int64_t>(args.batch, 1));
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

int64_t squares_parts(const Convolution& args) {
  return blocks_per_tile(args, parts(args), args.algorithm == kDepthwise ? kElementBlocks : kSumBlocks);
}

void squared_norms_cuda(const Convolution& args, void* stream) {
  check(args);
  if (args.batch == 0) return;
  const Layer s = make_layer(args);
  const int64_t tiles = parts(args);
  if (tiles > kMaxInt) throw std::invalid_argument("convolution: too many tiles for one launch");
  const int64_t sample_blocks = args.squares   ? squares_parts(args)
                                : args.weights ? blocks_per_tile(args, tiles, kElementBlocks)
                                               : std::min(args.batch, kMaxBlocks);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(sample_blocks));
  const auto queue = static_cast<cudaStream_t>(stream);
  if (args.algorithm == kDepthwise) {
    const auto kernel = depthwise_kernel(s);
    kernel<<<grid, kThreads, 0, queue>>>(s);
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
