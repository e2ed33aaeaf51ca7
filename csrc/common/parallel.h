// Splits rows over threads: those of the OpenMP runtime that the process has loaded already, which is torch's, else
// fresh ones.
//
// Nothing is linked: a second OpenMP runtime in one process costs speed and breaks fork. But the threads of the first
// one spin for a while after each of torch's own loops, and threads beside them would have to share their cores.
//
// A forked child inherits that runtime's belief in its threads, but not the threads: it would wait for them for ever.
// There, fresh ones do the work.
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

// Below this much work (in units of about one nanosecond on one core) a second thread costs more than it saves.
constexpr int64_t kSerialCutoff = 10000;

// `run(function, data, threads, flags)` of an OpenMP runtime calls the function once in each thread of a team.
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
inline bool forked = false;
inline const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

inline OpenMPParallel openmp_parallel() {
#if defined(__linux__)
  // Looked up at the first use: by then torch is imported.
  static const auto found = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
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

// Calls work(slot) in up to `threads` threads at once; slot 0 is the caller's.
template <class Work>
void run_team(int threads, const Work& work) {
  if (const OpenMPParallel parallel = openmp_parallel()) {
    struct Team {
      const Work& work;
      std::thread::id caller;
      std::atomic<int> slots{1};
    } team{work, std::this_thread::get_id()};
    const auto member = [](void* data) {
      Team& mine = *static_cast<Team*>(data);
      mine.work(std::this_thread::get_id() == mine.caller ? 0 : mine.slots.fetch_add(1));
    };
    return parallel(member, &team, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int slot = 1; slot < threads; ++slot) helpers.emplace_back(work, slot);
  } catch (const std::system_error&) {
    // The system has no thread to spare: those that started, and the caller, do the work.
  }
  work(0);
  for (auto& helper : helpers) helper.join();
}

// Rows that are still to do of those that were one thread's; on a cache line of its own.
struct alignas(64) Part {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Calls body(begin, end) on disjoint ranges that cover [0, rows), on at most `threads` threads, the caller's included;
// or body(begin, end, slot), where slot < max(threads, 1) is a number that no other thread has at that time (for
// scratch). `cost` is the work of one row in the unit above. The caller has released the GIL; body must not throw, and
// what it computes for a row must not depend on the range that the row comes in.
template <class Body>
void parallel_rows(int64_t rows, int64_t cost, int threads, const Body& body) {
  const int64_t total = rows * std::max<int64_t>(cost, 1);
  const int64_t useful = std::min<int64_t>({threads, rows, total / kSerialCutoff + 1});
  if (useful <= 1) {
    if (rows > 0) call_range(body, 0, rows, 0);
    return;
  }
  // A thread has a part of its own, the same at each call, whose memory its caches may still hold; and four ranges in
  // it, so that the others can take some over when the machine takes the thread away for a while.
  const int64_t step = std::max<int64_t>(1, rows / (useful * 4));
  Part few[8];
  std::vector<Part> many(static_cast<size_t>(useful > 8 ? useful : 0));
  Part* const parts = useful > 8 ? many.data() : few;
  for (int64_t i = 0; i < useful; ++i) {
    parts[i].next = rows * i / useful;
    parts[i].end = rows * (i + 1) / useful;
  }
  run_team(static_cast<int>(useful), [&](int slot) {
    for (int64_t i = 0; i < useful; ++i) {
      Part& part = parts[(slot + i) % useful];
      for (int64_t begin; (begin = part.next.fetch_add(step)) < part.end;)
        call_range(body, begin, std::min(begin + step, part.end), slot);
    }
  });
}

}  // namespace kdfast
