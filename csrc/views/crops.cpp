// Crops boxes of uint8 images, resizes them (bilinear, antialiased), mirrors and normalizes them, one sample at a time:
// the rows of the box along their width, then along the height. All sums are exact integers.
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

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
constexpr int64_t kSpare = 16;  // bytes after a row, which vectors read

// The pixels of one axis that the new pixels are made of.
struct Axis {
  int64_t taps = 0;                     // even
  std::vector<int32_t> first, weights;  // (size,), (size, taps)

  void set(int64_t extent, int64_t size) {
    const int64_t widest = std::max(extent, size), reach = 2 * widest;
    taps = (reach + size - 1) / size;
    taps += taps % 2;
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

#if defined(__x86_64__)

// SSE2 multiplies 16-bit integers and adds the products in pairs, so weights are split in two halves of 11 bits.
constexpr int kPart = kBits / 2;

// Two weights of one pair of taps, in every lane.
struct Pair {
  __m128i low, high;

  KDFAST_INLINE Pair(int32_t first, int32_t second)
      : low(_mm_set1_epi32((first & kMask) | (second & kMask) << 16)),
        high(_mm_set1_epi32(first >> kPart | (second >> kPart) << 16)) {}

  static constexpr int32_t kMask = (1 << kPart) - 1;
};

// The sums of products in four lanes.
struct Sums {
  __m128i low, high = _mm_setzero_si128();

  KDFAST_INLINE Sums() : low(_mm_set1_epi32(kHalf)) {}

  // Adds the products of pairs of 16-bit values.
  KDFAST_INLINE void add(__m128i values, const Pair& weights) {
    low = _mm_add_epi32(low, _mm_madd_epi16(values, weights.low));
    high = _mm_add_epi32(high, _mm_madd_epi16(values, weights.high));
  }

  KDFAST_INLINE __m128i rounded() const {
    return _mm_srli_epi32(_mm_add_epi32(low, _mm_slli_epi32(high, kPart)), kBits);
  }
};

KDFAST_INLINE __m128i load_eight(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

// Resizes one pixel of a row; `p` is the first that it is made of.
KDFAST_INLINE void resize_pixel(const uint8_t* p, const int32_t* weights, int64_t taps, uint8_t* out) {
  const __m128i zero = _mm_setzero_si128();
  Sums sums;
  for (int64_t k = 0; k < taps; k += 2) {
    const __m128i pixels = load_eight(p + k * kChannels);
    const __m128i pairs = _mm_unpacklo_epi8(pixels, _mm_srli_si128(pixels, kChannels));
    sums.add(_mm_unpacklo_epi8(pairs, zero), Pair(weights[k], weights[k + 1]));
  }
  const __m128i words = _mm_packs_epi32(sums.rounded(), zero);
  const int32_t word = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  std::memcpy(out, &word, sizeof word);
}

#else

KDFAST_INLINE void resize_pixel(const uint8_t* p, const int32_t* weights, int64_t taps, uint8_t* out) {
  for (int64_t channel = 0; channel < kChannels; ++channel) {
    int32_t sum = kHalf;
    for (int64_t k = 0; k < taps; ++k) sum += p[k * kChannels + channel] * weights[k];
    out[channel] = static_cast<uint8_t>(sum >> kBits);
  }
}

#endif

// Taps is the number of taps if it is known, else 0.
template <int Taps>
KDFAST_INLINE void resize_row(const uint8_t* line, const Axis& axis, int64_t size, bool flip, uint8_t* out) {
  const int64_t taps = Taps ? Taps : axis.taps;
  // A pixel is written as four bytes, the last of which the next one overwrites.
  for (int64_t i = 0; i < size; ++i) {
    const int64_t x = flip ? size - 1 - i : i;
    const uint8_t* p = line + axis.first[static_cast<size_t>(x)] * kChannels;
    resize_pixel(p, &axis.weights[static_cast<size_t>(x * taps)], taps, out + i * kChannels);
  }
}

// Writes the sums of the products of rows and weights; the rows have `count` values. Registers of eight and more lanes
// multiply 32-bit integers at once.
template <int W>
KDFAST_INLINE void resize_column(const uint8_t* rows, const int32_t* weights, int64_t taps, int64_t count,
                                 int32_t* sums, float* values) {
  int64_t start = 0;
#if defined(__x86_64__)
  if constexpr (W == 4) {
    const __m128i zero = _mm_setzero_si128();
    for (; start + 8 <= count; start += 8) {
      Sums first, second;
      for (int64_t k = 0; k < taps; k += 2) {
        const uint8_t* p = rows + k * count + start;
        const __m128i pairs = _mm_unpacklo_epi8(load_eight(p), load_eight(p + count));
        const Pair pair(weights[k], weights[k + 1]);
        first.add(_mm_unpacklo_epi8(pairs, zero), pair);
        second.add(_mm_unpackhi_epi8(pairs, zero), pair);
      }
      _mm_storeu_ps(values + start, _mm_cvtepi32_ps(first.rounded()));
      _mm_storeu_ps(values + start + 4, _mm_cvtepi32_ps(second.rounded()));
    }
  }
#endif
  const uint8_t *a = rows, *b = rows + count;
  const int32_t u = weights[0], v = weights[1];
  if (taps == 2) {
    for (int64_t i = start; i < count; ++i) values[i] = static_cast<float>((a[i] * u + b[i] * v + kHalf) >> kBits);
    return;
  }
  for (int64_t i = start; i < count; ++i) sums[i] = a[i] * u + b[i] * v + kHalf;
  for (int64_t k = 2; k < taps; ++k) {
    const uint8_t* row = rows + k * count;
    const int32_t w = weights[k];
    for (int64_t i = start; i < count; ++i) sums[i] += row[i] * w;
  }
  for (int64_t i = start; i < count; ++i) values[i] = static_cast<float>(sums[i] >> kBits);
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
        resize_column<W>(rows, weights, down.taps, out_row, scratch.sums.data(), scratch.values.data());
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
