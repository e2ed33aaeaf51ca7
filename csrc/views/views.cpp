// Shifted and mirrored uint8 images, normalised: the augmentation of a batch in one pass.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/core.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace kdfast {
namespace {

constexpr int64_t kChannels = 3;

typedef uint8_t Bytes __attribute__((vector_size(16)));

// Five pixels end to end fill 15 of 16 bytes.
constexpr int64_t kGroup = 5;
KDFAST_INLINE Bytes reversed(Bytes group) {
#if defined(__clang__)
  return __builtin_shufflevector(group, group, 12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2, 15);
#else
  return __builtin_shuffle(group, Bytes{12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2, 15});
#endif
}

// What the rows of a batch share: scale and bias repeated along a row, so that a row is one long vector.
struct Shared {
  const ShiftViews& args;
  std::vector<float> scale, bias;

  explicit Shared(const ShiftViews& a) : args(a) {
    for (int64_t x = 0; x < a.width; ++x) {
      scale.insert(scale.end(), a.scale, a.scale + kChannels);
      bias.insert(bias.end(), a.bias, a.bias + kChannels);
    }
  }
};

// pixels[0], pixels[-1], ... pixels[-(count - 1)] to `out`; both have 16 bytes of room behind their last pixel.
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

// The bytes of one output row: a black margin, pixels read forwards or backwards, a black margin.
KDFAST_INLINE void cut_row(const uint8_t* source, uint8_t* line, int64_t width, int64_t right, bool flip) {
  const int64_t inside = width - std::min(width, std::abs(right));
  const int64_t shift = flip ? -right : right;  // mirrored, the margin lies on the other side
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

template <int W, class T>
KDFAST_INLINE void normalise(const uint8_t* line, const Shared& shared, float* values, T* out, int64_t count) {
  const float *scale = shared.scale.data(), *bias = shared.bias.data();
  // A loop that compilers vectorise by themselves; they take the conversion of a vector of bytes apart lane by lane.
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(line[i]);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    encode(out + i, load<W>(values + i) * load<W>(scale + i) + load<W>(bias + i));
  }
  for (; i < count; ++i) encode_one(out + i, values[i] * scale[i] + bias[i]);
}

template <int W, class T>
KDFAST_INLINE void cut_images(const Shared& shared, int64_t begin, int64_t end) {
  const ShiftViews& args = shared.args;
  const int64_t row = args.width * kChannels;
  std::vector<uint8_t> buffers(static_cast<size_t>(2 * (row + 16)));
  std::vector<float> values(static_cast<size_t>(row));
  uint8_t *source = buffers.data(), *line = source + row + 16;
  for (int64_t index = begin; index < end; ++index) {
    const int32_t* move = args.moves + index * 3;
    const uint8_t* image = args.images + index * args.height * row;
    T* out = static_cast<T*>(args.out) + index * args.height * row;
    for (int64_t y = 0; y < args.height; ++y, out += row) {
      const int64_t from = y + move[0] - args.pad;
      if (from < 0 || from >= args.height) {
        std::memset(line, 0, static_cast<size_t>(row));
      } else {
        std::memcpy(source, image + from * row, static_cast<size_t>(row));
        cut_row(source, line, args.width, move[1] - args.pad, move[2] != 0);
      }
      normalise<W>(line, shared, values.data(), out, row);
    }
  }
}

using Kernel = void (*)(const Shared&, int64_t, int64_t);

#define KDFAST_CUT_IMAGES(suffix, width, attribute)                                      \
  template <class T>                                                                     \
  attribute void cut_images_##suffix(const Shared& shared, int64_t begin, int64_t end) { \
    cut_images<width, T>(shared, begin, end);                                            \
  }
KDFAST_FOR_EACH_ISA(KDFAST_CUT_IMAGES)
#undef KDFAST_CUT_IMAGES

template <class T>
Kernel kernel_for(int level) {
  const Kernel base = cut_images_base<T>;
#ifdef KDFAST_X86
  return level >= 2 ? cut_images_v4<T> : level == 1 ? cut_images_v3<T> : base;
#else
  return static_cast<void>(level), base;
#endif
}

}  // namespace

void shift_views(const ShiftViews& args) {
  check_dtype(args.dtype);
  if (args.batch < 0 || args.height < 1 || args.width < 1 || args.pad < 0) {
    throw std::invalid_argument("shift_views: sizes must be positive and the pad at least 0");
  }
  for (int64_t i = 0; i < args.batch; ++i) {
    const int32_t* move = args.moves + i * 3;
    if (move[0] < 0 || move[0] > 2 * args.pad || move[1] < 0 || move[1] > 2 * args.pad || move[2] < 0 || move[2] > 1) {
      throw std::invalid_argument("shift_views: a move leaves the padded image");
    }
  }
  const Shared shared(args);
  const int level = isa_level(args.isa_limit);
  const Kernel kernel = args.dtype == kFloat32    ? kernel_for<float>(level)
                        : args.dtype == kBFloat16 ? kernel_for<BFloat16>(level)
                                                  : kernel_for<Float16>(level);
  // About a third of a nanosecond for a pixel's three values, memory included.
  const int64_t cost = args.height * args.width / 3;
  parallel_rows(args.batch, cost, args.threads, [&](int64_t begin, int64_t end) { kernel(shared, begin, end); });
}

}  // namespace kdfast
