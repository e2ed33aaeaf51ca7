// Squared norms of a convolution's per-sample weight gradients: checks, and samples over threads.
#include "grad_norms/grad_norms.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "grad_norms/algorithms.h"
#include "grad_norms/loops.h"

namespace kdfast {
namespace {

std::unique_ptr<GhostWay> way_of(const GhostConv& a) {
  return a.way == 0 ? ghost_direct(a) : a.way == 1 ? ghost_pixel(a) : ghost_depthwise(a);
}

}  // namespace

void ghost_check(const GhostConv& a) {
  const int64_t least = std::min({a.channels, a.height, a.width, a.outputs, a.out_height, a.out_width, a.groups});
  if (a.batch < 0 || least < 1) throw std::invalid_argument("ghost_conv: sizes must be positive");
  if (a.channels % a.groups || a.outputs % a.groups)
    throw std::invalid_argument("ghost_conv: groups must divide channels and outputs");
  if (a.way < 0 || a.way > 2) throw std::invalid_argument("ghost_conv: way must be 0, 1 or 2");
  if (a.way == 2 && a.channels != a.groups) throw std::invalid_argument("ghost_conv: way 2 is for one channel a group");
  for (int i = 0; i < 2; ++i) {
    if (std::min({a.kernel[i], a.stride[i], a.dilation[i]}) < 1 || a.pad[i] < 0)
      throw std::invalid_argument("ghost_conv: kernel, stride and dilation must be positive, pads at least 0");
  }
}

void ghost_conv(const GhostConv& args) {
  ghost_check(args);
  const std::unique_ptr<GhostWay> way = way_of(args);
  const int threads = static_cast<int>(std::clamp<int64_t>(args.threads, 1, std::max<int64_t>(args.batch, 1)));
  const int64_t size = round_up(way->scratch(), kLanes);
  std::vector<float> memory(static_cast<size_t>(threads * size + kLanes));
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  float* scratch = memory.data() + (round_up(static_cast<int64_t>(address), 64) - static_cast<int64_t>(address)) / 4;
  // About 50 multiply-adds a nanosecond.
  parallel_rows(args.batch, way->work() / 50 + 100, threads, [&](int64_t begin, int64_t end, int slot) {
    for (int64_t i = begin; i < end; ++i) args.out[i] = way->square(i, scratch + slot * size);
  });
}

}  // namespace kdfast
