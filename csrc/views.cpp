// Shifted and mirrored uint8 images, each pixel through a table: the augmentation and the normalisation in one pass.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "core.h"
#include "parallel.h"

namespace kdfast {
namespace {

constexpr int kChannels = 3;

template <class Element>
class Shifter {
 public:
  explicit Shifter(const ShiftViews& args) : args_(args), table_(static_cast<const Element*>(args.table)) {}

  void image(int64_t index) const {
    const int32_t* move = args_.moves + index * 3;
    const int64_t image_size = args_.height * args_.width * kChannels;
    const uint8_t* from = args_.images + index * image_size;
    Element* to = static_cast<Element*>(args_.out) + index * image_size;
    const int64_t down = move[0] - args_.pad, right = move[1] - args_.pad;
    const bool flip = move[2] != 0;
    for (int64_t y = 0; y < args_.height; ++y, to += args_.width * kChannels) {
      const int64_t source = y + down;
      if (source < 0 || source >= args_.height) {
        black(to, args_.width);
      } else if (flip) {
        row<-1>(from + source * args_.width * kChannels, to, right);
      } else {
        row<1>(from + source * args_.width * kChannels, to, right);
      }
    }
  }

 private:
  // One output row from one source row: a black margin, pixels read forwards or backwards, a black margin.
  template <int step>
  void row(const uint8_t* from, Element* to, int64_t right) const {
    const int64_t width = args_.width;
    const int64_t inside = width - std::min(width, std::abs(right));
    const int64_t shift = step * right;  // mirrored, the margin lies on the other side
    const int64_t before = inside == 0 ? width : std::max<int64_t>(0, -shift);
    black(to, before);
    to += before * kChannels;
    const int64_t first = step > 0 ? std::max<int64_t>(0, right) : width - 1 + std::min<int64_t>(0, right);
    const uint8_t* pixel = from + (inside == 0 ? 0 : first) * kChannels;
    const Element *red = table_, *green = table_ + 256, *blue = table_ + 512;
    for (int64_t x = 0; x < inside; ++x, to += kChannels) {
      const uint8_t* p = pixel + x * step * kChannels;
      to[0] = red[p[0]];
      to[1] = green[p[1]];
      to[2] = blue[p[2]];
    }
    black(to, width - before - inside);
  }

  void black(Element* to, int64_t count) const {
    for (int64_t x = 0; x < count; ++x, to += kChannels) {
      to[0] = table_[0];
      to[1] = table_[256];
      to[2] = table_[512];
    }
  }

  const ShiftViews& args_;
  const Element* table_;
};

template <class Element>
void run(const ShiftViews& args) {
  const Shifter<Element> shifter(args);
  // About a nanosecond for a pixel's three values.
  parallel_rows(args.batch, args.height * args.width, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) shifter.image(index);
  });
}

}  // namespace

void shift_views(const ShiftViews& args) {
  if (args.batch < 0 || args.height < 1 || args.width < 1 || args.pad < 0) {
    throw std::invalid_argument("shift_views: sizes must be positive and the pad at least 0");
  }
  for (int64_t i = 0; i < args.batch; ++i) {
    const int32_t* move = args.moves + i * 3;
    if (move[0] < 0 || move[0] > 2 * args.pad || move[1] < 0 || move[1] > 2 * args.pad || move[2] < 0 || move[2] > 1) {
      throw std::invalid_argument("shift_views: a move leaves the padded image");
    }
  }
  // The values are copied, never computed with: only their size matters.
  switch (args.element_size) {
    case 2:
      return run<uint16_t>(args);
    case 4:
      return run<uint32_t>(args);
    case 8:
      return run<uint64_t>(args);
    default:
      throw std::invalid_argument("shift_views: elements must have 2, 4 or 8 bytes");
  }
}

}  // namespace kdfast
