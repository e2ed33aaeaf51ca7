// Gathers, shifts, mirrors and normalizes uint8 images in one pass: random-crop and flip augmentation.
#include "views/views.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "views/normalise.h"

namespace kdfast {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(16)));

constexpr int64_t kGroup = 5;  // pixels: they fill 15 of 16 bytes

// Reverses the order of the five pixels.
KDFAST_INLINE Bytes reversed(Bytes group) {
#if defined(__clang__)
  return __builtin_shufflevector(group, group, 12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2, 15);
#else
  return __builtin_shuffle(group, Bytes{12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2, 15});
#endif
}

// State shared by the rows of a batch.
struct BatchContext {
  const GatherViews& args;
  Normalisation normalisation;

  explicit BatchContext(const GatherViews& a) : args(a), normalisation(a.scale, a.bias, a.width) {}
};

// Window of a view in the padded image, and whether it is mirrored.
struct Window {
  int64_t top, left;
  bool flip;
};

inline Window window_of(const GatherViews& args, int64_t view_id) {
  const int64_t shift = args.flip ? view_id / 2 : view_id, side = 2 * args.pad + 1;
  return {shift / side, shift % side, args.flip && view_id % 2 != 0};
}

// The image of a sample; of the last sample for those after it.
inline const uint8_t* image_of(const GatherViews& args, int64_t index) {
  index = std::min(index, args.batch - 1);
  return args.images + (args.rows ? args.rows[index] : index) * args.height * args.width * kChannels;
}

// Copies pixels[0], pixels[-1], ..., pixels[-(count - 1)] to `out`. Both arrays have 16 spare bytes after the last
// pixel.
KDFAST_INLINE void copy_reversed(const uint8_t* pixels, uint8_t* out, int64_t count) {
  int64_t x = 0;
  for (; x + kGroup <= count; x += kGroup) {
    Bytes group;
    std::memcpy(&group, pixels - (x + kGroup - 1) * kChannels, sizeof group);
    group = reversed(group);
    std::memcpy(out + x * kChannels, &group, sizeof group);
  }
  for (; x < count; ++x) std::memcpy(out + x * kChannels, pixels - x * kChannels, kChannels);
}

// Writes the bytes of one output row: a black margin, pixels in forward or backward order, a black margin.
KDFAST_INLINE void cut_row(const uint8_t* source, uint8_t* line, int64_t width, int64_t right, bool flip) {
  const int64_t inside = width - std::min(width, std::abs(right));
  const int64_t shift = flip ? -right : right;  // mirroring moves the margin to the other side
  const int64_t before = inside == 0 ? width : std::max<int64_t>(0, -shift);
  uint8_t* to = line + before * kChannels;
  if (flip) {
    copy_reversed(source + (width - 1 + std::min<int64_t>(0, right)) * kChannels, to, inside);
  } else {
    std::memcpy(to, source + std::max<int64_t>(0, right) * kChannels, static_cast<size_t>(inside * kChannels));
  }
  std::memset(line, 0, static_cast<size_t>(before * kChannels));
  std::memset(to + inside * kChannels, 0, static_cast<size_t>((width - before - inside) * kChannels));
}

template <class T>
struct CutImages {
  template <int W>
  KDFAST_INLINE static void run(const BatchContext& batch, int64_t begin, int64_t end) {
    const GatherViews& args = batch.args;
    const int64_t row = args.width * kChannels;
    std::vector<uint8_t> buffers(static_cast<size_t>(2 * (row + 16)));
    std::vector<float> values(static_cast<size_t>(row));
    uint8_t *source = buffers.data(), *line = source + row + 16;
    for (int64_t index = begin; index < end; ++index) {
      const Window window = window_of(args, args.view_ids[index]);
      const uint8_t *image = image_of(args, index), *next = image_of(args, index + 1);
      T* out = static_cast<T*>(args.out) + index * args.height * row;
      for (int64_t y = 0; y < args.height; ++y, out += row) {
        // Images at random addresses defeat the hardware's prefetcher.
        for (int64_t at = args.rows ? 0 : row; at < row; at += 64) __builtin_prefetch(next + y * row + at);
        const int64_t from = y + window.top - args.pad;
        if (from < 0 || from >= args.height) {
          std::memset(line, 0, static_cast<size_t>(row));
        } else {
          const uint8_t* pixels = image + from * row;
          // Mirroring reads a few bytes beyond the row, which the last image does not have.
          if (window.flip) pixels = static_cast<const uint8_t*>(std::memcpy(source, pixels, static_cast<size_t>(row)));
          cut_row(pixels, line, args.width, window.left - args.pad, window.flip);
        }
        // Compilers vectorize this loop, but would convert an explicit vector of bytes lane by lane.
        for (int64_t i = 0; i < row; ++i) values[static_cast<size_t>(i)] = static_cast<float>(line[i]);
        batch.normalisation.apply<W>(values.data(), out);
      }
    }
  }
};

// By dtype code.
struct Kernels {
  void (*cut_images[3])(const BatchContext&, int64_t, int64_t);
};

template <class Isa>
constexpr Kernels make_kernels() {
  return {{Isa::template run<CutImages<float>>, Isa::template run<CutImages<BFloat16>>,
           Isa::template run<CutImages<Float16>>}};
}

constexpr Kernels kKernels[] = KDFAST_FOR_EACH_ISA(make_kernels);

}  // namespace

void gather_views(const GatherViews& args) {
  check_dtype(args.dtype);
  if (args.batch < 0 || args.height < 1 || args.width < 1 || args.pad < 0 || (!args.rows && args.count < args.batch)) {
    throw std::invalid_argument(
        "gather_views: sizes must be positive, the pad at least 0, and each sample needs an image");
  }
  const int64_t side = 2 * args.pad + 1, views = side * side * (args.flip ? 2 : 1);
  for (int64_t i = 0; i < args.batch; ++i) {
    if (args.view_ids[i] < 0 || args.view_ids[i] >= views) {
      throw std::invalid_argument("gather_views: a view id is out of range");
    }
    if (args.rows && (args.rows[i] < 0 || args.rows[i] >= args.count)) {
      throw std::invalid_argument("gather_views: a row is out of range");
    }
  }
  const BatchContext batch(args);
  const auto kernel = kKernels[isa_level(args.isa_limit)].cut_images[args.dtype];
  // A pixel's three values take about a third of a nanosecond, memory access included.
  const int64_t cost = args.height * args.width / 3;
  parallel_rows(args.batch, cost, args.threads, [&](int64_t begin, int64_t end) { kernel(batch, begin, end); });
}

}  // namespace kdfast
