// The vector loops of the per-sample gradient norms. Each struct with a static run<W> is compiled once per instruction
// set; sums have the same order on all of them.
#include "grad_norms/loops.h"

namespace kdfast::grad_norms {
namespace {

template <int W>
KDFAST_INLINE Floats<W> broadcast(float x) {
  Floats<W> r;
  KDFAST_EACH_PART(k) r.part[k] = x - typename Floats<W>::Part{};  // x - 0, unlike x + 0, compiles to no arithmetic
  return r;
}

// Fused where the hardware has the instruction; the C library's fma would take hundreds of times as long.
template <int W>
KDFAST_INLINE Floats<W> multiply_add(Floats<W> a, Floats<W> b, Floats<W> c) {
  if constexpr (W >= 8) return fma(a, b, c);
  return a * b + c;
}

#define KDFAST_EACH_ROW(i) _Pragma("GCC unroll 8") for (int i = 0; i < R; ++i)
#define KDFAST_EACH_VECTOR(j) _Pragma("GCC unroll 3") for (int j = 0; j < V; ++j)

template <int W, int R, int V>
KDFAST_INLINE void multiply_part(Panel left, Panel right, int64_t rows, int64_t count, float* out, int64_t ld,
                                 bool add) {
  Floats<W> sums[R][V];
  KDFAST_EACH_ROW(i) KDFAST_EACH_VECTOR(j) sums[i][j] = broadcast<W>(0);
  for (int64_t y = 0; y < rows; ++y) {
    const float *l = left.data + y * left.row, *r = right.data + y * right.row;
    for (int64_t t = 0; t < count; ++t, l += left.step, r += right.step) {
      Floats<W> v[V];
      KDFAST_EACH_VECTOR(j) v[j] = load<W>(r + j * kLanes);
      KDFAST_EACH_ROW(i) {
        const Floats<W> s = broadcast<W>(l[i]);
        KDFAST_EACH_VECTOR(j) sums[i][j] = multiply_add(s, v[j], sums[i][j]);
      }
    }
  }
  KDFAST_EACH_ROW(i) KDFAST_EACH_VECTOR(j) {
    float* to = out + i * ld + j * kLanes;
    store(to, add ? load<W>(to) + sums[i][j] : sums[i][j]);
  }
}

// One register tile of eight rows, split into parts whose sums fit the registers.
template <int W, int V>
KDFAST_INLINE void multiply_tile(Panel left, Panel right, int64_t rows, int64_t count, float* out, int64_t ld,
                                 bool add) {
  if constexpr (W == 16) {
    multiply_part<W, kTileRows, V>(left, right, rows, count, out, ld, add);
  } else {
    constexpr int R = W == 8 ? 4 : 2;
    for (int j = 0; j < V; ++j) {
      for (int i = 0; i < kTileRows; i += R) {
        const Panel l{left.data + i, left.step, left.row}, r{right.data + j * kLanes, right.step, right.row};
        multiply_part<W, R, 1>(l, r, rows, count, out + i * ld + j * kLanes, ld, add);
      }
    }
  }
}

struct Multiply {
  template <int W>
  KDFAST_INLINE static void run(int vectors, Panel left, Panel right, int64_t rows, int64_t count, float* out,
                                int64_t ld, bool add) {
    if (vectors == 3) {
      multiply_tile<W, 3>(left, right, rows, count, out, ld, add);
    } else if (vectors == 2) {
      multiply_tile<W, 2>(left, right, rows, count, out, ld, add);
    } else {
      multiply_tile<W, 1>(left, right, rows, count, out, ld, add);
    }
  }
};

struct WeightedSum {
  template <int W>
  KDFAST_INLINE static double run(const float* const* rows, int count, const float* weights, int64_t begin,
                                  int64_t end) {
    if (count == 0) return 0;
    Floats<W> sum = broadcast<W>(0);
    for (int64_t s = begin; s < end; s += kLanes) {
      Floats<W> v = load<W>(rows[0] + s);
      for (int r = 1; r < count; ++r) v = v + load<W>(rows[r] + s);
      sum = multiply_add(v, load<W>(weights + s), sum);
    }
    return sum_of(sum);
  }
};

template <int W, int R>
KDFAST_INLINE void dots_of(const float* const* rows, const float* x, int64_t size, double* totals) {
  // Blocks of floats are added in double, so that the error does not grow with the size.
  constexpr int64_t kBlock = 64 * kLanes;
  for (int r = 0; r < R; ++r) totals[r] = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    Floats<W> sums[R];
    for (int r = 0; r < R; ++r) sums[r] = broadcast<W>(0);
    for (int64_t s = begin; s < std::min(begin + kBlock, size); s += kLanes) {
      const Floats<W> v = load<W>(x + s);
      _Pragma("GCC unroll 9") for (int r = 0; r < R; ++r) sums[r] = multiply_add(v, load<W>(rows[r] + s), sums[r]);
    }
    for (int r = 0; r < R; ++r) totals[r] += sum_of(sums[r]);
  }
}

struct Dots {
  template <int W>
  KDFAST_INLINE static void run(const float* const* rows, int count, const float* x, int64_t size, double* out) {
    int r = 0;
    for (; r + 9 <= count; r += 9) dots_of<W, 9>(rows + r, x, size, out + r);
    for (; r + 3 <= count; r += 3) dots_of<W, 3>(rows + r, x, size, out + r);
    for (; r < count; ++r) dots_of<W, 1>(rows + r, x, size, out + r);
  }
};

template <int W, int R>
KDFAST_INLINE double squared_dots(const float* const* rows, const float* x, int64_t size) {
  double totals[R];
  dots_of<W, R>(rows, x, size, totals);
  double square = 0;
  for (int r = 0; r < R; ++r) square += totals[r] * totals[r];
  return square;
}

struct SquaredDots {
  template <int W>
  KDFAST_INLINE static double run(const float* const* rows, int count, const float* x, int64_t size) {
    double total = 0;
    int r = 0;
    for (; r + 9 <= count; r += 9) total += squared_dots<W, 9>(rows + r, x, size);
    for (; r + 3 <= count; r += 3) total += squared_dots<W, 3>(rows + r, x, size);
    for (; r < count; ++r) total += squared_dots<W, 1>(rows + r, x, size);
    return total;
  }
};

struct SumOfSquares {
  template <int W>
  KDFAST_INLINE static double run(const float* x, int64_t size) {
    constexpr int64_t kBlock = 64 * kLanes;
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += kBlock) {
      Floats<W> sum = broadcast<W>(0);
      for (int64_t s = begin; s < std::min(begin + kBlock, size); s += kLanes) {
        const Floats<W> v = load<W>(x + s);
        sum = multiply_add(v, v, sum);
      }
      total += sum_of(sum);
    }
    return total;
  }
};

struct WeightedSquares {
  template <int W>
  KDFAST_INLINE static double run(const float* x, const float* weights, int64_t size) {
    // Several sums, so that additions need not wait for each other.
    constexpr int kSums = 4;
    constexpr int64_t kStep = kSums * kLanes, kBlock = 64 * kStep;
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += kBlock) {
      Floats<W> sums[kSums];
      for (int j = 0; j < kSums; ++j) sums[j] = broadcast<W>(0);
      for (int64_t s = begin; s < std::min(begin + kBlock, size); s += kStep) {
        _Pragma("GCC unroll 4") for (int j = 0; j < kSums; ++j) {
          const Floats<W> v = load<W>(x + s + j * kLanes);
          sums[j] = multiply_add(v * v, load<W>(weights + s + j * kLanes), sums[j]);
        }
      }
      total += sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return total;
  }
};

struct AddSquares {
  template <int W>
  KDFAST_INLINE static void run(const float* x, float* sums, int64_t size) {
    for (int64_t s = 0; s < size; s += kLanes) {
      const Floats<W> v = load<W>(x + s);
      store(sums + s, multiply_add(v, v, load<W>(sums + s)));
    }
  }
};

template <class Isa>
constexpr VectorLoops make_loops() {
  return {Isa::template run<Multiply>,  Isa::template run<WeightedSum>,  Isa::template run<SquaredDots>,
          Isa::template run<Dots>,      Isa::template run<SumOfSquares>, Isa::template run<WeightedSquares>,
          Isa::template run<AddSquares>};
}

constexpr VectorLoops kLoops[] = KDFAST_FOR_EACH_ISA(make_loops);

}  // namespace

const VectorLoops& vector_loops(int isa_limit) { return kLoops[isa_level(isa_limit)]; }

}  // namespace kdfast::grad_norms
