// Shifted, cropped and mirrored views of uint8 images, and random permutations evaluated one element at a time.
#pragma once

#include <cstdint>

namespace kdfast {

// For each sample, a window of the zero-padded image, mirrored or not: out = pixel * scale + bias per channel.
struct GatherViews {
  const uint8_t* images;    // (N, H, W, 3) contiguous
  const int64_t* rows;      // (B,) contiguous: image of each sample, in [0, N); null: sample i has image i
  const int64_t* view_ids;  // (B,) contiguous: (top * (2 pad + 1) + left) * flips + mirrored, with 2 flips or 1
  const float* scale;       // (3,); the product and the sum are rounded separately
  const float* bias;        // (3,)
  int64_t count, batch, height, width, pad;
  bool flip;  // whether there are 2 flips
  void* out;  // (B, H, W, 3) contiguous
  int dtype;  // of out
  int threads, isa_limit;
};

// Throws std::invalid_argument if sizes are inconsistent or a row or view id is out of range.
void gather_views(const GatherViews& args);

// For each sample, a box of an image, resized (bilinear, antialiased, in integers), mirrored or not, and normalized.
// The Python function kdfast.ops.views.crops.crop_views defines the arithmetic.
struct CropViews {
  const uint8_t* images;  // (N, H, W, 3) contiguous
  const int64_t* rows;    // (B,) contiguous: image of each sample, in [0, N); null: sample i has image i
  const int32_t* boxes;   // (B, 5) contiguous: top, left, height, width, flip
  const float* scale;     // (3,)
  const float* bias;      // (3,)
  int64_t count, batch, height, width;
  int64_t out_height, out_width;
  void* out;  // (B, out_height, out_width, 3) contiguous
  int dtype;  // of out
  int threads, isa_limit;
};

// Throws std::invalid_argument if sizes are inconsistent, a row is out of range or a box leaves its image.
void crop_views(const CropViews& args);

// out[i] = element `position` of the random permutation of [0, size) with key keys[i]. Throws std::invalid_argument if
// `size` or `position` is out of range.
void shuffled_at(int64_t position, int64_t size, const uint64_t* keys, int64_t count, int64_t* out, int threads);

}  // namespace kdfast
