// CUDA's asynchronous copies, for a CPU.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t size, size_t zeros = 0) {
  emulation::copy_async(shared, global, size, zeros);
}
inline void __pipeline_commit() { emulation::commit_copies(); }
inline void __pipeline_wait_prior(size_t batches) { emulation::wait_for_copies(batches); }
