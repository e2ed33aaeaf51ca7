// Checks of the sizes of a convolution, for a CPU and a GPU.
#include <algorithm>
#include <stdexcept>

#include "grad_norms/grad_norms.h"

namespace kdfast::grad_norms {

void check(const Convolution& a) {
  const int64_t least = std::min({a.channels, a.height, a.width, a.outputs, a.out_height, a.out_width, a.groups});
  if (a.batch < 0 || least < 1) throw std::invalid_argument("convolution: sizes must be positive");
  if (a.channels % a.groups || a.outputs % a.groups)
    throw std::invalid_argument("convolution: groups must divide channels and outputs");
  if (a.algorithm < kDirect || a.algorithm > kDepthwise)
    throw std::invalid_argument("convolution: algorithm must be 0 (direct), 1 (Gram) or 2 (depthwise)");
  if (a.algorithm == kDepthwise && a.channels != a.groups)
    throw std::invalid_argument("convolution: the depthwise algorithm needs one channel per group");
  if ((a.weights || a.squares) && a.algorithm == kGram)
    throw std::invalid_argument("convolution: weights and squares need the direct or the depthwise algorithm");
  if (a.weights && a.squares) throw std::invalid_argument("convolution: sums of squares have no weights");
  for (int i = 0; i < 2; ++i) {
    if (std::min({a.kernel[i], a.stride[i], a.dilation[i]}) < 1 || a.pad[i] < 0)
      throw std::invalid_argument("convolution: kernel, stride and dilation must be positive, pads at least 0");
  }
}

}  // namespace kdfast::grad_norms
