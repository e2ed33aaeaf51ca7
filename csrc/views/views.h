// Shifted and mirrored views of uint8 images, and random permutations evaluated one element at a time.
#pragma once

#include <cstdint>

namespace kdfast {

// For each image, a window of the zero-padded image, mirrored or not: out = pixel * scale + bias per channel.
struct ShiftViews {
  const uint8_t* images;   // (B, H, W, 3) contiguous
  const int32_t* offsets;  // (B, 3) contiguous: top and left in [0, 2 pad], flip in {0, 1}
  const float* scale;      // (3,); the product and the sum are rounded separately
  const float* bias;       // (3,)
  int64_t batch, height, width, pad;
  void* out;  // (B, H, W, 3) contiguous
  int dtype;  // of out
  int threads, isa_limit;
};

// Throws std::invalid_argument if sizes are inconsistent or a window leaves the padded image.
void shift_views(const ShiftViews& args);

// out[i] = element `position` of the random permutation of [0, size) with key keys[i]. Throws std::invalid_argument if
// `size` or `position` is out of range.
void shuffled_at(int64_t position, int64_t size, const uint64_t* keys, int64_t count, int64_t* out, int threads);

}  // namespace kdfast
