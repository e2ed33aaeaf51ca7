// Norms of per-sample gradients without the gradients: the C++ surface.
#pragma once

#include <cstdint>

namespace kdfast {

// A convolution's inputs and output gradients, of which the per-sample weight gradients G_n follow.
struct GhostConv {
  const float* a;        // (N, channels, height, width)
  int64_t a_strides[4];  // in elements
  const float* b;        // (N, outputs, out_height, out_width)
  int64_t b_strides[4];
  int64_t batch, channels, height, width, outputs, out_height, out_width;
  int64_t kernel[2], stride[2], dilation[2];
  int64_t pad[2];  // zeros above and to the left
  int64_t groups;
  int way;      // 0: form G tile by tile; 1: Gram matrices (on a CPU of pixels); 2: one channel a group
  double* out;  // (N,): ||G_n||^2; on a GPU (N, parts), to be summed over the parts
  int threads, isa_limit;
};

// Throws std::invalid_argument on inconsistent sizes.
void ghost_check(const GhostConv& args);

// All of these throw as ghost_check does.
void ghost_conv(const GhostConv& args);
#ifdef KDFAST_WITH_CUDA
int64_t ghost_parts(const GhostConv& args);
// `stream` is a cudaStream_t of the current device, which holds all operands.
void ghost_conv_cuda(const GhostConv& args, void* stream);
#endif

}  // namespace kdfast
