#include "emulator.h"

#include <sanitizer/asan_interface.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <queue>
#include <random>
#include <utility>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kMaxShared = 48 << 10;  // of a kernel that does not ask for more
constexpr unsigned kMaxThreads = 1024;

[[noreturn]] void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("emulation: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::fflush(stderr);
  std::_Exit(3);
}

enum class State { kReady, kBlockBarrier, kWarpBarrier, kDone };

struct Copy {
  void* target;
  const void* source;
  size_t size, zeros;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;  // of the address sanitizer
  unsigned index = 0;
  uint32_t priority = 0;
  State state = State::kReady;
  Site site{};
  uint64_t exchanged = 0;
  std::vector<std::vector<Copy>> batches;
};

struct Shared {
  char* data;
  size_t size, alignment;
};

std::mt19937 random_bits;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

const std::function<void()>* kernel = nullptr;
dim3 grid, block, index_of_block;
std::vector<std::unique_ptr<Fiber>> fibers;
std::priority_queue<std::pair<uint32_t, unsigned>> ready;  // priorities and indices of threads
Fiber* current = nullptr;
std::map<int, Shared> variables;

unsigned random_below(size_t bound) { return static_cast<unsigned>(random_bits() % bound); }

// The next thread is any, or warps or threads run ahead of others as far as barriers let them; each block draws one.
enum class Order { kAny, kWarps, kThreads };
Order order_of_threads;

void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  const auto& decides = fibers[order_of_threads == Order::kWarps ? fiber.index / kWarp * kWarp : fiber.index];
  ready.emplace(order_of_threads == Order::kAny ? static_cast<uint32_t>(random_bits()) : decides->priority,
                fiber.index);
}

// Back to the scheduler.
void suspend() {
  Fiber& self = *current;
  void** fake_stack = self.state == State::kDone ? nullptr : &self.fake_stack;
  __sanitizer_start_switch_fiber(fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

void resume(Fiber& fiber) {
  current = &fiber;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void run_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*kernel)();
  current->state = State::kDone;
  suspend();
}

void start(Fiber& fiber, unsigned index) {
  fiber.index = index;
  fiber.priority = static_cast<uint32_t>(random_bits());
  fiber.fake_stack = nullptr;
  fiber.batches.assign(1, {});
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStack);  // frames of the thread that ended here
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
}

// Lets other threads go first now and then, where a thread of a GPU may be held up.
void yield_at_random() {
  if (random_below(4)) return;
  make_ready(*current);
  suspend();
}

// Lets the threads begin ... end continue if all of them wait at the same place.
void release_if_complete(unsigned begin, unsigned end, State barrier) {
  const Fiber& first = *fibers[begin];
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i]->state != barrier) return;
  for (unsigned i = begin; i < end; ++i) {
    const Fiber& other = *fibers[i];
    if (other.site.line != first.site.line || std::strcmp(other.site.file, first.site.file))
      fail("divergent barrier: threads %u and %u wait at %s:%d and %s:%d", first.index, other.index, first.site.file,
           first.site.line, other.site.file, other.site.line);
  }
  for (unsigned i = begin; i < end; ++i) make_ready(*fibers[i]);
}

void wait(State barrier, Site site, unsigned begin, unsigned end) {
  current->state = barrier;
  current->site = site;
  release_if_complete(begin, end, barrier);
  suspend();
}

void check_that_all_are_done() {
  unsigned done = 0;
  const Fiber* waiting = nullptr;
  for (unsigned i = 0; i < block.x; ++i) {
    if (fibers[i]->state == State::kDone) {
      ++done;
    } else {
      waiting = fibers[i].get();
    }
  }
  if (waiting)
    fail("deadlock: %u of %u threads wait, and %u have returned; thread %u waits for its %s at %s:%d", block.x - done,
         block.x, done, waiting->index, waiting->state == State::kBlockBarrier ? "block" : "warp", waiting->site.file,
         waiting->site.line);
}

void run_block() {
  order_of_threads = static_cast<Order>(random_below(3));
  for (unsigned i = 0; i < block.x; ++i) start(*fibers[i], i);
  for (unsigned i = 0; i < block.x; ++i) make_ready(*fibers[i]);
  while (!ready.empty()) {
    const unsigned next = ready.top().second;
    ready.pop();
    resume(*fibers[next]);
  }
  check_that_all_are_done();
  for (const auto& entry : variables) ::operator delete(entry.second.data, std::align_val_t(entry.second.alignment));
  variables.clear();
}

}  // namespace

void seed(uint32_t value) { random_bits.seed(value); }

void launch(const std::function<void()>& body, dim3 grid_, dim3 block_, size_t dynamic_shared_bytes, void*) {
  if (block_.x < 1 || block_.x > kMaxThreads || block_.y != 1 || block_.z != 1 || grid_.z != 1)
    fail("a launch of blocks of %u x %u x %u threads", block_.x, block_.y, block_.z);
  if (grid_.x < 1 || grid_.y < 1 || grid_.x > 0x7fffffffu || grid_.y > 65535)
    fail("a launch of %u x %u blocks", grid_.x, grid_.y);
  if (dynamic_shared_bytes) fail("dynamic shared memory is not emulated");
  grid = grid_;
  block = block_;
  kernel = &body;
  while (fibers.size() < block.x) fibers.push_back(std::make_unique<Fiber>());
  std::vector<unsigned> order(static_cast<size_t>(grid.x) * grid.y);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_bits);
  for (const unsigned i : order) {
    index_of_block = dim3(i % grid.x, i / grid.x);
    run_block();
  }
}

dim3 grid_size() { return grid; }
dim3 block_size() { return block; }
dim3 block_index() { return index_of_block; }
dim3 thread_index() { return dim3(current->index, 0, 0); }

void block_barrier(Site site) { wait(State::kBlockBarrier, site, 0, block.x); }

void warp_barrier(unsigned mask, Site site) {
  if (mask != 0xffffffffu) fail("%s:%d: a warp operation on some lanes only is not emulated", site.file, site.line);
  const unsigned begin = current->index / kWarp * kWarp;
  if (begin + kWarp > block.x)
    fail("%s:%d: the warp of thread %u has lanes without a thread", site.file, site.line, begin);
  wait(State::kWarpBarrier, site, begin, begin + kWarp);
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, Site site) {
  current->exchanged = value;
  warp_barrier(mask, site);
  if (lane < kWarp) value = fibers[current->index / kWarp * kWarp + lane]->exchanged;
  warp_barrier(mask, site);
  return value;
}

void* shared_variable(int id, size_t size, size_t alignment) {
  auto found = variables.find(id);
  if (found == variables.end()) {
    alignment = std::max<size_t>(alignment, 16);
    Shared variable{static_cast<char*>(::operator new(size, std::align_val_t(alignment))), size, alignment};
    std::memset(variable.data, 0xff, size);
    found = variables.emplace(id, variable).first;
    size_t total = 0;
    for (const auto& entry : variables) total += entry.second.size;
    if (total > kMaxShared) fail("a block has %zu bytes of shared memory, of at most %zu", total, kMaxShared);
  }
  return found->second.data;
}

void copy_async(void* target, const void* source, size_t size, size_t zeros) {
  if (size != 4 && size != 8 && size != 16) fail("an asynchronous copy of %zu bytes", size);
  if (zeros > size) fail("an asynchronous copy with %zu zeros in %zu bytes", zeros, size);
  if (reinterpret_cast<uintptr_t>(target) % size || (zeros < size && reinterpret_cast<uintptr_t>(source) % size))
    fail("an asynchronous copy of %zu bytes that is not aligned to them", size);
  std::memset(target, 0xff, size);
  current->batches.back().push_back({target, source, size, zeros});
}

void commit_copies() {
  current->batches.emplace_back();
  yield_at_random();
}

void wait_for_copies(size_t remaining_batches) {
  auto& batches = current->batches;  // the last one is open
  while (batches.size() > remaining_batches + 1) {
    for (const Copy& copy : batches.front()) {
      std::memset(copy.target, 0, copy.size);
      if (copy.zeros < copy.size) std::memcpy(copy.target, copy.source, copy.size - copy.zeros);
    }
    batches.erase(batches.begin());
  }
  yield_at_random();
}

}  // namespace emulation
