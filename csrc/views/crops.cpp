// Crops boxes of uint8 images, resizes them (bilinear, antialiased), mirrors and normalizes them, one sample at a time:
// the rows of the box along their width, then along the height. All sums are exact integers.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "views/normalise.h"
#include "views/views.h"

namespace kdfast {
namespace {

constexpr int kBits = 22;
constexpr int32_t kHalf = 1 << (kBits - 1);
constexpr int64_t kSpare = 16;  // bytes after a row, which vectors of four bytes read

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int32_t Quad __attribute__((vector_size(16)));  // the channels of a pixel, and one lane of no meaning

#if defined(__clang__)
#define KDFAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KDFAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bytes{__VA_ARGS__})
#endif

KDFAST_INLINE Quad load_pixel(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  const Bytes bytes = (Bytes)(Quad{static_cast<int32_t>(word), 0, 0, 0}), zero = {};
  const Bytes pairs = KDFAST_SHUFFLE(bytes, zero, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return (Quad)KDFAST_SHUFFLE(pairs, zero, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
}

// Writes the lowest byte of each lane.
KDFAST_INLINE void store_pixel(uint8_t* p, Quad v) {
  const Bytes bytes = (Bytes)v;
  const Bytes low = KDFAST_SHUFFLE(bytes, bytes, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  const int32_t word = ((Quad)low)[0];
  std::memcpy(p, &word, sizeof word);
}

// The pixels of one axis that the new pixels are made of.
struct Axis {
  int64_t taps = 0;
  std::vector<int32_t> first, weights;  // (size,), (size, taps)

  void set(int64_t extent, int64_t size) {
    const int64_t widest = std::max(extent, size), reach = 2 * widest;
    taps = (reach + size - 1) / size;
    first.resize(static_cast<size_t>(size));
    weights.resize(static_cast<size_t>(size * taps));
    for (int64_t x = 0; x < size; ++x) {
      const int64_t center = (2 * x + 1) * extent, low = center - reach + size;
      const int64_t begin = low <= 0 ? 0 : low / (2 * size);
      int32_t* w = &weights[static_cast<size_t>(x * taps)];
      int64_t sum = 0;
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t distance = std::abs((2 * (begin + k) + 1) * size - center);
        const int64_t part = begin + k < extent ? std::max<int64_t>(0, reach - distance) : 0;
        w[k] = static_cast<int32_t>(part);
        sum += part;
      }
      for (int64_t k = 0; k < taps; ++k) {
        const uint64_t doubled = static_cast<uint64_t>(w[k]) << (kBits + 1);
        w[k] = static_cast<int32_t>((doubled + static_cast<uint64_t>(sum)) / static_cast<uint64_t>(2 * sum));
      }
      // Taps without weight may lie beyond the end.
      first[static_cast<size_t>(x)] = static_cast<int32_t>(begin);
    }
  }
};

// What a thread needs for a sample.
struct Scratch {
  Axis across, down;
  std::vector<uint8_t> line;     // a row of the box
  std::vector<uint8_t> resized;  // (box height, out width, 3)
  std::vector<int32_t> sums;     // (out width, 3)
  std::vector<float> values;     // likewise
};

template <int Taps>
KDFAST_INLINE void resize_row(const uint8_t* line, const Axis& axis, int64_t size, bool flip, uint8_t* out) {
  const int64_t taps = Taps ? Taps : axis.taps;
  // Each store writes a byte too many, which the next one overwrites: so a mirrored row is written from its end on.
  for (int64_t i = 0; i < size; ++i) {
    const int64_t x = flip ? size - 1 - i : i;
    const uint8_t* p = line + axis.first[static_cast<size_t>(x)] * kChannels;
    const int32_t* w = &axis.weights[static_cast<size_t>(x * taps)];
    Quad sum = {kHalf, kHalf, kHalf, kHalf};
    for (int64_t k = 0; k < taps; ++k) sum += load_pixel(p + k * kChannels) * w[k];
    store_pixel(out + i * kChannels, sum >> kBits);
  }
}

// Sums the products of rows and weights; the rows have 3 size values.
KDFAST_INLINE void resize_column(const uint8_t* rows, const int32_t* weights, int64_t taps, int64_t count,
                                 int32_t* sums, float* values) {
  const uint8_t *a = rows, *b = rows + count;
  const int32_t u = weights[0], v = weights[1];
  if (taps == 2) {
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>((a[i] * u + b[i] * v + kHalf) >> kBits);
    return;
  }
  for (int64_t i = 0; i < count; ++i) sums[i] = a[i] * u + b[i] * v + kHalf;
  for (int64_t k = 2; k < taps; ++k) {
    const uint8_t* row = rows + k * count;
    const int32_t w = weights[k];
    for (int64_t i = 0; i < count; ++i) sums[i] += row[i] * w;
  }
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(sums[i] >> kBits);
}

struct CropContext {
  const CropViews& args;
  Normalisation normalisation;

  explicit CropContext(const CropViews& a) : args(a), normalisation(a.scale, a.bias, a.out_width) {}
};

template <class T>
struct CropImages {
  template <int W>
  KDFAST_INLINE static void run(const CropContext& context, int64_t begin, int64_t end) {
    const CropViews& args = context.args;
    const int64_t row = args.width * kChannels, out_row = args.out_width * kChannels;
    Scratch scratch;
    for (int64_t index = begin; index < end; ++index) {
      const int32_t* box = args.boxes + index * 5;
      const int64_t top = box[0], left = box[1], tall = box[2], wide = box[3];
      Axis &across = scratch.across, &down = scratch.down;
      across.set(wide, args.out_width);
      down.set(tall, args.out_height);
      // Taps without weight read up to `taps` pixels or rows beyond the end.
      scratch.line.resize(static_cast<size_t>((wide + across.taps) * kChannels + kSpare));
      scratch.resized.resize(static_cast<size_t>((tall + down.taps) * out_row + kSpare));
      scratch.sums.resize(static_cast<size_t>(out_row));
      scratch.values.resize(static_cast<size_t>(out_row));
      const uint8_t* pixels = args.images + (args.rows ? args.rows[index] : index) * args.height * row;
      pixels += top * row + left * kChannels;
      for (int64_t y = 0; y < tall; ++y, pixels += row) {
        uint8_t* to = &scratch.resized[static_cast<size_t>(y * out_row)];
        std::memcpy(scratch.line.data(), pixels, static_cast<size_t>(wide * kChannels));
        if (across.taps == 2) {
          resize_row<2>(scratch.line.data(), across, args.out_width, box[4] != 0, to);
        } else {
          resize_row<0>(scratch.line.data(), across, args.out_width, box[4] != 0, to);
        }
      }
      T* out = static_cast<T*>(args.out) + index * args.out_height * out_row;
      for (int64_t y = 0; y < args.out_height; ++y, out += out_row) {
        const uint8_t* rows = &scratch.resized[static_cast<size_t>(down.first[static_cast<size_t>(y)] * out_row)];
        const int32_t* weights = &down.weights[static_cast<size_t>(y * down.taps)];
        resize_column(rows, weights, down.taps, out_row, scratch.sums.data(), scratch.values.data());
        context.normalisation.apply<W>(scratch.values.data(), out);
      }
    }
  }
};

// By dtype code.
struct Kernels {
  void (*crop_images[3])(const CropContext&, int64_t, int64_t);
};

template <class Isa>
constexpr Kernels make_kernels() {
  return {{Isa::template run<CropImages<float>>, Isa::template run<CropImages<BFloat16>>,
           Isa::template run<CropImages<Float16>>}};
}

constexpr Kernels kKernels[] = KDFAST_FOR_EACH_ISA(make_kernels);

void check(const CropViews& args) {
  check_dtype(args.dtype);
  if (args.batch < 0 || args.height < 1 || args.width < 1 || args.out_height < 1 || args.out_width < 1 ||
      (!args.rows && args.count < args.batch)) {
    throw std::invalid_argument("crop_views: sizes must be positive, and each sample needs an image");
  }
  for (int64_t i = 0; i < args.batch; ++i) {
    const int32_t* box = args.boxes + i * 5;
    const int64_t bottom = int64_t{box[0]} + box[2], right = int64_t{box[1]} + box[3];
    if (box[0] < 0 || box[1] < 0 || box[2] < 1 || box[3] < 1 || bottom > args.height || right > args.width ||
        box[4] < 0 || box[4] > 1) {
      throw std::invalid_argument("crop_views: a box does not lie in its image");
    }
    if (args.rows && (args.rows[i] < 0 || args.rows[i] >= args.count)) {
      throw std::invalid_argument("crop_views: a row is out of range");
    }
  }
}

}  // namespace

void crop_views(const CropViews& args) {
  check(args);
  const CropContext context(args);
  const auto kernel = kKernels[isa_level(args.isa_limit)].crop_images[args.dtype];
  // A new pixel takes about a nanosecond.
  const int64_t cost = args.out_height * args.out_width;
  parallel_rows(args.batch, cost, args.threads, [&](int64_t begin, int64_t end) { kernel(context, begin, end); });
}

}  // namespace kdfast
