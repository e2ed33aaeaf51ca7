// Normalization of rows of pixels: scale and bias, repeated for every pixel so that a row is one long vector.
#pragma once

#include <vector>

#include "common/dtype.h"

namespace kdfast {

constexpr int64_t kChannels = 3;

// out = values * scale + bias; the product and the sum are rounded separately.
struct Normalisation {
  std::vector<float> scale, bias;  // (3 width,)

  Normalisation(const float* channel_scale, const float* channel_bias, int64_t width) {
    for (int64_t x = 0; x < width; ++x) {
      scale.insert(scale.end(), channel_scale, channel_scale + kChannels);
      bias.insert(bias.end(), channel_bias, channel_bias + kChannels);
    }
  }

  template <int W, class T>
  KDFAST_INLINE void apply(const float* values, T* out) const {
    const int64_t count = static_cast<int64_t>(scale.size());
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      encode(out + i, load<W>(values + i) * load<W>(scale.data() + i) + load<W>(bias.data() + i));
    }
    for (; i < count; ++i) encode_one(out + i, values[i] * scale[i] + bias[i]);
  }
};

}  // namespace kdfast
