// The part of CUDA that the kernels use, for a CPU. A new kernel may need more.
#pragma once

#include <math.h>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __restrict__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define gridDim (emulation::grid_size())
#define blockDim (emulation::block_size())
#define blockIdx (emulation::block_index())
#define threadIdx (emulation::thread_index())

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// The default arguments name the place of the call.
#define SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SITE) { emulation::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SITE) { emulation::warp_barrier(mask, {file, line}); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, SITE) {
  const unsigned lane = threadIdx.x % emulation::kWarp;
  return emulation::shuffle(mask, value, lane ^ static_cast<unsigned>(bits), {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, SITE) {
  return emulation::shuffle(mask, value, threadIdx.x % emulation::kWarp + distance, {file, line});
}

#undef SITE
