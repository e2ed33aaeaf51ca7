// Elements of random permutations, one permutation per key, by 32 rounds of the swap-or-not shuffle (Hoang, Morris and
// Rogaway 2012). The NumPy function kdfast.data.stateless_random.permutation_element is the reference and explains the
// method.
#include <algorithm>
#include <stdexcept>

#include "common/parallel.h"
#include "views/views.h"

namespace kdfast {
namespace {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15;
constexpr uint64_t kRounds = 32;

uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6B;
  x = (x ^ (x >> 13)) * 0xC2B2AE35;
  return x ^ (x >> 16);
}

int64_t shuffled(int64_t x, int64_t size, uint64_t key) {
  for (uint64_t round = 1; round <= kRounds; ++round) {
    const uint64_t word = mix64(key + round * kGamma);
    int64_t partner = static_cast<int64_t>(((word >> 32) * static_cast<uint64_t>(size)) >> 32) - x;
    if (partner < 0) partner += size;
    const uint32_t coin = mix32(static_cast<uint32_t>(word) ^ static_cast<uint32_t>(std::max(x, partner))) & 1;
    x = coin ? partner : x;
  }
  return x;
}

}  // namespace

void shuffled_at(int64_t position, int64_t size, const uint64_t* keys, int64_t count, int64_t* out, int threads) {
  if (size < 1 || size > int64_t{0xFFFFFFFF} || position < 0 || position >= size) {
    throw std::invalid_argument("shuffled_at: the size must lie in [1, 2**32) and the position in [0, size)");
  }
  parallel_rows(count, 2 * kRounds, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = shuffled(position, size, keys[i]);
  });
}

}  // namespace kdfast
