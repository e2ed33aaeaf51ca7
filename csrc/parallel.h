// Splits rows over threads. No OpenMP: torch bundles its own runtime, and a second copy costs speed and breaks fork.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace kdfast {

// Below this much work (in units of about one nanosecond on one core) a second thread costs more than it saves.
constexpr int64_t kSerialCutoff = 100000;

// Calls body(begin, end) on disjoint ranges that cover [0, rows), on at most `threads` threads, the caller's included.
// `cost` is the work of one row in the unit above. The caller has released the GIL; body must not throw, and what it
// computes for a row must not depend on the range that the row comes in. Threads live no longer than the call, so a
// process may fork at any time.
template <class Body>
void parallel_rows(int64_t rows, int64_t cost, int threads, const Body& body) {
  const int64_t total = rows * std::max<int64_t>(cost, 1);
  const int64_t useful = std::min<int64_t>({threads, rows, total / kSerialCutoff + 1});
  if (useful <= 1) {
    if (rows > 0) body(int64_t{0}, rows);
    return;
  }
  // Four ranges a thread: a thread that the machine takes away for a while does not hold up the rest.
  const int64_t step = std::max<int64_t>(1, rows / (useful * 4));
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(step)) < rows;) body(begin, std::min(begin + step, rows));
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(useful - 1));
  try {
    for (int64_t i = 1; i < useful; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The system has no thread to spare: those that started, and the caller, do the work.
  }
  work();
  for (auto& helper : helpers) helper.join();
}

}  // namespace kdfast
