// Runs CUDA kernels on a CPU: a fiber for each thread of a block, one block after the other. Fibers run in a random
// order, each until it waits, so that a result that depends on the order shows. A fault ends the program with a
// message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr unsigned kWarp = 32;

// The order of threads and blocks follows from the seed.
void seed(uint32_t value);

// Runs body, a call of a kernel, in every thread. Blocks must have one dimension.
void launch(const std::function<void()>& body, dim3 grid, dim3 block, size_t dynamic_shared_bytes = 0,
            void* stream = nullptr);

dim3 grid_size();
dim3 block_size();
dim3 block_index();
dim3 thread_index();

// A place in the source of a kernel, for messages.
struct Site {
  const char* file;
  int line;
};

// Wait for all threads of the block or of the warp, which must call from the same place.
void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);

// Returns the number `value`, of at most 8 bytes, that another lane of the warp passed; a lane outside the warp gives
// the thread's own.
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, Site site);

template <class T>
T shuffle(unsigned mask, T value, unsigned lane, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, lane, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The block's shared variable with this id; its bytes are 0xff (NaN) at first.
void* shared_variable(int id, size_t size, size_t alignment);

template <class T>
T& shared(int id) {
  return *static_cast<T*>(shared_variable(id, sizeof(T), alignof(T)));
}

// Asynchronous copies from global to shared memory: the target is NaN until the copy has been waited for.
void copy_async(void* target, const void* source, size_t size, size_t zeros);
void commit_copies();
void wait_for_copies(size_t remaining_batches);

}  // namespace emulation
