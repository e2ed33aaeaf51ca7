// Vector loops over one row of logits: its largest element, the sums of its terms, and its gradient. Each struct with a
// static run<W> is compiled once per instruction set; row_loops.h defines the terms e1, e and u.
#include "kd_loss/row_loops.h"

#include <utility>

#include "common/dtype.h"
#include "common/simd.h"
#include "common/simd64.h"
#include "kd_loss/row_vectors.h"

namespace kdfast {
namespace {

// e1 from e, unless the power is kPowerAny.
template <int kPower, int W>
KDFAST_INLINE Floats<W> raise(Floats<W> e) {
  if constexpr (kPower == kPowerTwo || kPower == kPowerFour) e = e * e;
  if constexpr (kPower == kPowerFour) e = e * e;
  return e;
}

// Returns the largest of n elements. With kCopy, writes them as floats to `out`, followed by -inf; else only the last
// vector of them.
template <bool kCopy, int W, class T>
KDFAST_INLINE float load_row(const T* p, int64_t n, float* out) {
  Floats<W> m = splat<W>(-kInf), m2 = m;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Floats<W> a = decode<W>(p + i), b = decode<W>(p + i + kLanes);
    m = max(a, m);
    m2 = max(b, m2);
    if (kCopy) store(out + i, a), store(out + i + kLanes, b);
  }
  if (i + kLanes <= n) {
    const Floats<W> a = decode<W>(p + i);
    m = max(a, m);
    if (kCopy) store(out + i, a);
    i += kLanes;
  }
  if (i < n && n >= kLanes) {
    // Processing the last 16 elements, some of them twice, is cheaper than processing a partial vector.
    const Floats<W> a = decode<W>(p + n - kLanes);
    m2 = max(a, m2);
    store(out + n - kLanes, a);
    store(out + n, splat<W>(-kInf));
  } else if (i < n) {
    const Floats<W> a = decode_part<W>(p, n, -kInf);
    m2 = max(a, m2);
    store(out, a);
  }
  return max_of(max(m, m2));
}

template <int W, class T>
KDFAST_INLINE float load_strided(const T* p, int64_t stride, int64_t n, float* out) {
  Floats<W> m = splat<W>(-kInf);
  for (int64_t i = 0; i < n; i += kLanes) {
    T part[kLanes] = {};
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    for (int64_t j = 0; j < count; ++j) part[j] = p[(i + j) * stride];
    const Floats<W> a = decode_part<W>(part, count, -kInf);
    m = max(a, m);
    store(out + i, a);
  }
  return max_of(m);
}

template <class T>
struct LoadRow {
  template <int W>
  KDFAST_INLINE static float run(const void* data, int64_t stride, int64_t n, float* out, bool copy) {
    const T* p = static_cast<const T*>(data);
    if (stride != 1) return load_strided<W>(p, stride, n, out);
    return copy ? load_row<true, W>(p, n, out) : load_row<false, W>(p, n, out);
  }
};

template <int kPower>
struct StudentSums {
  template <int W>
  KDFAST_INLINE static Sums run(const float* z, int64_t n, float max_z, float inv_t, bool keep, Scratch s,
                                const Prefetch& prefetch) {
    const Prefetch next = prefetch;  // a copy, which no store of the loop can change
    Sum<W> e1_sum, e_sum;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = begin + kBlock < n ? begin + kBlock : n;
      for (int64_t i = begin; i < end; i += kLanes) {
        prefetch_at(next, i);
        const Floats<W> d = load_padded<W>(z, s.e, i, n) - splat<W>(max_z);
        const Floats<W> e = exp_nonpositive(d * splat<W>(inv_t));
        const Floats<W> e1 = kPower == kPowerAny ? exp_nonpositive(d) : raise<kPower>(e);
        e_sum.add(e);
        e1_sum.add(e1);
        if (keep) store(s.e + i, e);
        if (kPower == kPowerAny && keep) store(s.e1 + i, e1);
      }
      e_sum.flush();
      e1_sum.flush();
    }
    return {e1_sum.total, e_sum.total, 0, 0};
  }
};

template <bool kReverse, int kPower>
struct PairSums {
  template <int W>
  KDFAST_INLINE static Sums run(const float* z, const float* t, int64_t n, float max_z, float max_t, float origin,
                                float inv_t, bool keep, Scratch s, const Prefetch& prefetch) {
    const Prefetch next = prefetch;  // a copy, which no store of the loop can change
    Sum<W> e1_sum, e_sum, u_sum, cross;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = begin + kBlock < n ? begin + kBlock : n;
      for (int64_t i = begin; i < end; i += kLanes) {
        prefetch_at(next, i);
        const Floats<W> d = load_padded<W>(z, s.e, i, n) - splat<W>(max_z);
        const Floats<W> b = d * splat<W>(inv_t);
        const Floats<W> teacher_logits = load_padded<W>(t, s.u, i, n);
        const Floats<W> a = (teacher_logits - splat<W>(max_t)) * splat<W>(inv_t);
        const Floats<W> e = exp_nonpositive(b);
        const Floats<W> e1 = kPower == kPowerAny ? exp_nonpositive(d) : raise<kPower>(e);
        const Floats<W> u = exp_nonpositive(a);
        e_sum.add(e);
        e1_sum.add(e1);
        u_sum.add(u);
        // A class of probability zero adds nothing, even if the other distribution's log-probability is infinite.
        const Floats<W> weight = kReverse ? e : u;
        const Floats<W> gap = kReverse ? b - (teacher_logits - splat<W>(origin)) * splat<W>(inv_t) : a - b;
        cross.add_product(weight, where_nonzero(weight, gap));
        if (keep) {
          store(s.e + i, e);
          store(s.u + i, kReverse ? gap : u);
          if (kPower == kPowerAny) store(s.e1 + i, e1);
        }
      }
      e_sum.flush();
      e1_sum.flush();
      u_sum.flush();
      cross.flush();
    }
    return {e1_sum.total, e_sum.total, u_sum.total, cross.total};
  }
};

template <bool kReverse, int W>
KDFAST_INLINE Floats<W> gradient_of(Floats<W> e, Floats<W> u, Floats<W> e1, Slopes s) {
  if constexpr (!kReverse) return fma(e1, splat<W>(s.e1), fma(e, splat<W>(s.e), u * splat<W>(-s.u)));
  const Floats<W> kl_part = e * splat<W>(s.e) * (u - splat<W>(s.shift));
  return fma(e1, splat<W>(s.e1), where_nonzero(e, kl_part));
}

template <bool kReverse, int kPower>
struct GradientVectors {
  Scratch s;
  bool has_teacher;
  Slopes slopes;
  template <int W>
  KDFAST_INLINE Floats<W> at(int64_t i) const {
    const Floats<W> e = load<W>(s.e + i);
    const Floats<W> u = has_teacher ? load<W>(s.u + i) : splat<W>(0);
    const Floats<W> e1 = kPower == kPowerAny ? load<W>(s.e1 + i) : raise<kPower>(e);
    return gradient_of<kReverse>(e, u, e1, slopes);
  }
};

template <bool kReverse, int kPower, class T>
struct WriteGradient {
  template <int W>
  KDFAST_INLINE static void run(Scratch s, bool has_teacher, int64_t n, Slopes slopes, bool around, void* out) {
    write_row<W>(GradientVectors<kReverse, kPower>{s, has_teacher, slopes}, n, around, static_cast<T*>(out));
  }
};

struct SumRow {
  template <int W>
  KDFAST_INLINE static double run(const float* p, int64_t n) {
    Sum<W> s;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      for (int64_t i = begin; i < n && i < begin + kBlock; i += kLanes) s.add(load<W>(p + i));
      s.flush();
    }
    return s.total;
  }
};

struct TotalOfRow {
  template <int W>
  KDFAST_INLINE static Total run(const float* x, const float* end, int64_t n, float max) {
    Sum<W> count, sum;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      for (int64_t i = begin; i < n && i < begin + kBlock; i += kLanes) {
        const Floats<W> d = load_padded<W>(x, end, i, n) - splat<W>(max);
        count.add(where_kept(d, splat<W>(1)));
        sum.add(where_kept(d, d));
      }
      count.flush();
      sum.flush();
    }
    return {count.total, sum.total};
  }
};

template <bool kReverse, int kPower>
struct SmoothedVectors {
  GradientVectors<kReverse, kPower> row;
  float subtracted;
  template <int W>
  KDFAST_INLINE Floats<W> at(int64_t i) const {
    return row.template at<W>(i) - splat<W>(subtracted);
  }
};

template <bool kReverse, int kPower, class T>
struct WriteSmoothed {
  template <int W>
  KDFAST_INLINE static void run(Scratch s, bool has_teacher, int64_t n, Slopes slopes, bool around, void* out,
                                float subtracted) {
    const SmoothedVectors<kReverse, kPower> row{{s, has_teacher, slopes}, subtracted};
    write_row<W>(row, n, around, static_cast<T*>(out));
  }
};

template <class T>
struct ScaleRow {
  template <int W>
  KDFAST_INLINE static void run(const void* from, void* to, int64_t n, float factor) {
    const T* grad = static_cast<const T*>(from);
    T* out = static_cast<T*>(to);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) encode(out + i, decode<W>(grad + i) * splat<W>(factor));
    if (i < n) encode_part(out + i, decode_part<W>(grad + i, n - i, 0.0f) * splat<W>(factor), n - i);
  }
};

struct Logarithms {
  template <int W>
  KDFAST_INLINE static void run(double* x) {
    store(x, log_positive(load<W>(static_cast<const double*>(x))));
  }
};

template <class Isa, bool kReverse, int kPower, class T>
constexpr void set_gradient_kernels(RowKernels* k, int dtype) {
  k->gradient[kReverse][kPower][dtype] = Isa::template run<WriteGradient<kReverse, kPower, T>>;
  k->smoothed_gradient[kReverse][kPower][dtype] = Isa::template run<WriteSmoothed<kReverse, kPower, T>>;
}

template <class Isa, bool kReverse, int kPower>
constexpr void set_teacher_kernels(RowKernels* k) {
  k->pair_sums[kReverse][kPower] = Isa::template run<PairSums<kReverse, kPower>>;
  set_gradient_kernels<Isa, kReverse, kPower, float>(k, kFloat32);
  set_gradient_kernels<Isa, kReverse, kPower, BFloat16>(k, kBFloat16);
  set_gradient_kernels<Isa, kReverse, kPower, Float16>(k, kFloat16);
}

template <class Isa, int... kPowers>
constexpr RowKernels make_kernels_of(std::integer_sequence<int, kPowers...>) {
  RowKernels k{};
  k.load[kFloat32] = Isa::template run<LoadRow<float>>;
  k.load[kBFloat16] = Isa::template run<LoadRow<BFloat16>>;
  k.load[kFloat16] = Isa::template run<LoadRow<Float16>>;
  ((k.student_sums[kPowers] = Isa::template run<StudentSums<kPowers>>), ...);
  (set_teacher_kernels<Isa, false, kPowers>(&k), ...);
  (set_teacher_kernels<Isa, true, kPowers>(&k), ...);
  k.scale[kFloat32] = Isa::template run<ScaleRow<float>>;
  k.scale[kBFloat16] = Isa::template run<ScaleRow<BFloat16>>;
  k.scale[kFloat16] = Isa::template run<ScaleRow<Float16>>;
  k.sum = Isa::template run<SumRow>;
  k.total = Isa::template run<TotalOfRow>;
  k.logarithms = Isa::template run<Logarithms>;
  return k;
}

template <class Isa>
constexpr RowKernels make_kernels() {
  return make_kernels_of<Isa>(std::make_integer_sequence<int, kPowerAny + 1>());
}

constexpr RowKernels kKernels[] = KDFAST_FOR_EACH_ISA(make_kernels);

}  // namespace

const RowKernels& row_kernels(int isa_limit) { return kKernels[isa_level(isa_limit)]; }

}  // namespace kdfast
