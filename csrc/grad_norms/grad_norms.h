// Functions of a convolution's per-sample weight gradients, without storing the gradients: squared norms, also with
// weights of the elements, and sums of squares over the samples.
//
// The weight gradient of sample n is G_n = sum_t b_t a_t^T over the output positions t, where a_t is the patch of the
// input at t and b_t the output gradient at t.
#pragma once

#include <cstdint>

namespace kdfast::grad_norms {

enum Algorithm : int {
  kDirect = 0,     // form G tile by tile and square it
  kGram = 1,       // ||G||^2 = sum over t, s of <a_t, a_s> <b_t, b_s>; on a CPU from Gram matrices of pixels
  kDepthwise = 2,  // for one input channel per group: each element of G is one dot product
};

// A convolution's inputs a and output gradients b. Strides count elements.
struct Convolution {
  const float* a;  // (N, channels, height, width)
  int64_t a_strides[4];
  const float* b;  // (N, outputs, out_height, out_width)
  int64_t b_strides[4];
  int64_t batch, channels, height, width, outputs, out_height, out_width;
  int64_t kernel[2], stride[2], dilation[2];
  int64_t pad[2];  // zeros above and to the left
  int64_t groups;
  int algorithm;
  // At most one of these, not for kGram; both contiguous, (outputs, channels / groups, kernel[0], kernel[1]).
  const float* weights;  // factors w of the squares, or null for 1
  // The sum over samples of the squares of G_n is added; on a GPU (squares_parts, ...), whose sum is the caller's. Null
  // where norms are wanted.
  double* squares;
  double* out;  // (N,): sum of w G_n^2; on a GPU (N, parts), whose rows the caller must sum. Unused with squares
  int threads, isa_limit;  // ignored on a GPU
};

// Throws std::invalid_argument if sizes are inconsistent, as do the functions below.
void check(const Convolution& args);

void squared_norms(const Convolution& args);
#ifdef KDFAST_WITH_CUDA
int64_t parts(const Convolution& args);
// At most as many as samples; kDirect: at most 32 MiB more than one gradient.
int64_t squares_parts(const Convolution& args);
// `stream` is a cudaStream_t of the current device, which must own all operands. Does not synchronize with the device.
void squared_norms_cuda(const Convolution& args, void* stream);
#endif

}  // namespace kdfast::grad_norms
