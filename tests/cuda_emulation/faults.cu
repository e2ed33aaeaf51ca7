// Kernels with a fault each, which the emulation must report, and one without.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <string>
#include <vector>

#include "emulator.h"

namespace {

constexpr int kThreads = 64;

// Every thread reads what another one wrote.
template <bool kBarrier>
__global__ void reverse(float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void some_threads_skip_a_barrier() {
  if (threadIdx.x < 10) __syncthreads();
}

__global__ void two_barriers_instead_of_one() {
  if (threadIdx.x < 10) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void some_lanes_skip_a_shuffle(float* out) {
  if (threadIdx.x % 32 < 10) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  __syncthreads();
}

__global__ void writes_beyond_shared_memory() {
  __shared__ float values[kThreads];
  values[threadIdx.x + 1] = 0;
}

__global__ void reads_beyond_global_memory(float* out) { out[threadIdx.x] = out[threadIdx.x + kThreads]; }

__global__ void reads_an_address_that_is_not_aligned(float* out) {
  __shared__ float values[kThreads + 4];
  const char* source = reinterpret_cast<const char*>(out) + 2;
  __pipeline_memcpy_async(&values[threadIdx.x], source, sizeof(float));
}

template <bool kWait>
__global__ void copy(float* out, const float* in) {
  __shared__ float values[kThreads];
  __pipeline_memcpy_async(&values[threadIdx.x], &in[threadIdx.x], sizeof(float));
  __pipeline_commit();
  if (kWait) __pipeline_wait_prior(0);
  out[threadIdx.x] = values[threadIdx.x];
}

void run(const std::string& name, float* out, const float* in) {
  if (name == "reverse") reverse<true><<<1, kThreads>>>(out);
  if (name == "missing_barrier") reverse<false><<<1, kThreads>>>(out);
  if (name == "skipped_barrier") some_threads_skip_a_barrier<<<1, kThreads>>>();
  if (name == "two_barriers") two_barriers_instead_of_one<<<1, kThreads>>>();
  if (name == "skipped_shuffle") some_lanes_skip_a_shuffle<<<1, kThreads>>>(out);
  if (name == "shared_overflow") writes_beyond_shared_memory<<<1, kThreads>>>();
  if (name == "global_overflow") reads_beyond_global_memory<<<1, kThreads>>>(out);
  if (name == "misaligned_copy") reads_an_address_that_is_not_aligned<<<1, kThreads>>>(out);
  if (name == "copy") copy<true><<<1, kThreads>>>(out, in);
  if (name == "missing_wait") copy<false><<<1, kThreads>>>(out, in);
}

}  // namespace

// Prints what the kernel named by the first argument makes, with the seed in the second.
int main(int, char** arguments) {
  emulation::seed(static_cast<uint32_t>(std::stoul(arguments[2])));
  std::vector<float> out(kThreads), in(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<float>(i + 1);
  run(arguments[1], out.data(), in.data());
  for (int i = 0; i < kThreads; ++i) std::printf("%g ", out[i]);
}
