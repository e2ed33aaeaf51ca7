// Splits rows over threads: the threads of the OpenMP runtime that the process has already loaded (torch's), or new
// std::threads.
//
// No OpenMP runtime is linked: a second one in a process costs speed and breaks fork. But torch's threads keep spinning
// for a while after each of torch's loops, and additional threads would compete with them for the cores.
//
// A forked child inherits the runtime's record of its threads but not the threads, so it would wait for them forever.
// It uses new threads instead.
#pragma once

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

namespace kdfast {

// Below this much work, in nanoseconds on one core, a second thread costs more than it saves.
constexpr int64_t kSerialCutoff = 10000;

// `run(function, data, threads, flags)` calls the function once in each of the runtime's threads.
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
inline bool in_forked_child = false;
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

inline OpenMPParallel openmp_parallel() {
#if defined(__linux__)
  // The lookup waits for the first use, since torch is imported by then.
  static const auto found = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return in_forked_child ? nullptr : found;
#else
  return nullptr;
#endif
}

template <class Body>
void call_range(const Body& body, int64_t begin, int64_t end, int slot) {
  if constexpr (std::is_invocable_v<const Body&, int64_t, int64_t, int>) {
    body(begin, end, slot);
  } else {
    body(begin, end);
  }
}

// Calls work(slot) on up to `threads` threads concurrently; the caller has slot 0.
template <class Work>
void run_on_threads(int threads, const Work& work) {
  if (const OpenMPParallel parallel = openmp_parallel()) {
    struct Region {
      const Work& work;
      std::thread::id caller;
      std::atomic<int> next_slot{1};
    } region{work, std::this_thread::get_id()};
    const auto enter = [](void* data) {
      Region& r = *static_cast<Region*>(data);
      r.work(std::this_thread::get_id() == r.caller ? 0 : r.next_slot.fetch_add(1));
    };
    return parallel(enter, &region, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int slot = 1; slot < threads; ++slot) workers.emplace_back(work, slot);
  } catch (const std::system_error&) {
    // The system cannot start more threads: the caller and those already started do the work.
  }
  work(0);
  for (auto& worker : workers) worker.join();
}

// The unclaimed rows of one thread's share, on its own cache line.
struct alignas(64) RowQueue {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Calls body(begin, end) on disjoint ranges that cover [0, rows), on at most `threads` threads including the caller.
// The body may take a third argument, a slot < max(threads, 1) that no other thread has at the time, to select its
// scratch. `cost` is the work of one row in nanoseconds. The caller must have released the GIL. The body must not
// throw, and its result for a row must not depend on the range that contains the row.
template <class Body>
void parallel_rows(int64_t rows, int64_t cost, int threads, const Body& body) {
  const int64_t total = rows * std::max<int64_t>(cost, 1);
  const int64_t useful = std::min<int64_t>({threads, rows, total / kSerialCutoff + 1});
  if (useful <= 1) {
    if (rows > 0) call_range(body, 0, rows, 0);
    return;
  }
  // Each thread has the same share at each call, since its caches may still hold that memory. A share is split into
  // four ranges, so that other threads can take some if the thread is suspended.
  const int64_t step = std::max<int64_t>(1, rows / (useful * 4));
  RowQueue few[8];
  std::vector<RowQueue> many(static_cast<size_t>(useful > 8 ? useful : 0));
  RowQueue* const queues = useful > 8 ? many.data() : few;
  for (int64_t i = 0; i < useful; ++i) {
    queues[i].next = rows * i / useful;
    queues[i].end = rows * (i + 1) / useful;
  }
  run_on_threads(static_cast<int>(useful), [&](int slot) {
    for (int64_t i = 0; i < useful; ++i) {
      RowQueue& queue = queues[(slot + i) % useful];
      for (int64_t begin; (begin = queue.next.fetch_add(step)) < queue.end;)
        call_range(body, begin, std::min(begin + step, queue.end), slot);
    }
  });
}

}  // namespace kdfast
