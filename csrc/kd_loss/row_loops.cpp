// Vector loops over one row of logits: largest element, sums of exponentials, gradient; compiled once per instruction
// set.
#include "kd_loss/row_loops.h"

#include <type_traits>

#include "common/dtype.h"
#include "common/simd.h"
#include "common/simd64.h"

namespace kdfast {
namespace {

constexpr int64_t kBlock = 1024;  // elements whose float sums are added up before they go into a double

template <int kPower, int W>
KDFAST_INLINE Floats<W> raise(Floats<W> e) {
  if constexpr (kPower == kPowerTwo || kPower == kPowerFour) e = e * e;
  if constexpr (kPower == kPowerFour) e = e * e;
  return e;
}

// Largest of n elements. Writes them as floats to `out`, followed by a vector of -inf; when the row is read in place
// (kCopy false), writes only the last vector of them.
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
    // The last full vector, part of it for the second time, is cheaper than part of one.
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

template <int W, class T>
KDFAST_INLINE float load_any(const T* p, int64_t stride, int64_t n, float* out, bool copy) {
  if (stride != 1) return load_strided<W>(p, stride, n, out);
  return copy ? load_row<true, W>(p, n, out) : load_row<false, W>(p, n, out);
}

// Full vectors of a row come from where it lies, the partial one from the scratch that load_row padded.
template <int W>
KDFAST_INLINE Floats<W> load_padded(const float* p, const float* scratch, int64_t i, int64_t n) {
  return load<W>((i + kLanes <= n ? p : scratch) + i);
}

// Starts to fetch what lies ahead of the vector at class i.
KDFAST_INLINE void fetch(const Ahead& a, int64_t i) {
  __builtin_prefetch(a.z + i * a.z_size);
  __builtin_prefetch(a.t + i * a.t_size);
  __builtin_prefetch(a.grad + i * a.grad_size, 1);
}

// Sums of a student's row. The scratch of the row receives the terms when they are to be kept.
template <int kPower, int W>
KDFAST_INLINE Sums student_sums(const float* z, int64_t n, float max_z, float inv_t, bool keep, Scratch s,
                                const Ahead& ahead) {
  const Ahead next = ahead;  // a copy, as no store of the loop can change it
  Sum<W> one, student;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    for (int64_t i = begin; i < end; i += kLanes) {
      fetch(next, i);
      const Floats<W> d = load_padded<W>(z, s.e, i, n) - splat<W>(max_z);
      const Floats<W> e = exp_nonpositive(d * splat<W>(inv_t));
      const Floats<W> e1 = kPower == kPowerAny ? exp_nonpositive(d) : raise<kPower>(e);
      student.add(e);
      one.add(e1);
      if (keep) store(s.e + i, e);
      if (kPower == kPowerAny && keep) store(s.e1 + i, e1);
    }
    student.flush();
    one.flush();
  }
  return {one.total, student.total, 0, 0};
}

// Sums of a student's and a teacher's row. To keep: e, u = exp((t - max t) / T) (b - a when kReverse) and e1.
template <int kPower, bool kReverse, int W>
KDFAST_INLINE Sums pair_sums(const float* z, const float* t, int64_t n, float max_z, float max_t, float from_t,
                             float inv_t, bool keep, Scratch s, const Ahead& ahead) {
  const Ahead next = ahead;  // a copy, as no store of the loop can change it
  Sum<W> one, student, teacher, cross;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    for (int64_t i = begin; i < end; i += kLanes) {
      fetch(next, i);
      const Floats<W> d = load_padded<W>(z, s.e, i, n) - splat<W>(max_z);
      const Floats<W> b = d * splat<W>(inv_t);
      const Floats<W> teacher_logits = load_padded<W>(t, s.u, i, n);
      const Floats<W> a = (teacher_logits - splat<W>(max_t)) * splat<W>(inv_t);
      const Floats<W> e = exp_nonpositive(b);
      const Floats<W> e1 = kPower == kPowerAny ? exp_nonpositive(d) : raise<kPower>(e);
      const Floats<W> u = exp_nonpositive(a);
      student.add(e);
      one.add(e1);
      teacher.add(u);
      // A class of probability zero adds nothing, even where the other side's logarithm is infinite.
      const Floats<W> weight = kReverse ? e : u;
      const Floats<W> gap = kReverse ? b - (teacher_logits - splat<W>(from_t)) * splat<W>(inv_t) : a - b;
      cross.add_product(weight, where_nonzero(weight, gap));
      if (keep) {
        store(s.e + i, e);
        store(s.u + i, kReverse ? gap : u);
        if (kPower == kPowerAny) store(s.e1 + i, e1);
      }
    }
    student.flush();
    one.flush();
    teacher.flush();
    cross.flush();
  }
  return {one.total, student.total, teacher.total, cross.total};
}

template <bool kReverse, int W>
KDFAST_INLINE Floats<W> gradient_of(Floats<W> e, Floats<W> u, Floats<W> e1, Slopes s) {
  if constexpr (!kReverse) return fma(e1, splat<W>(s.one), fma(e, splat<W>(s.student), u * splat<W>(-s.teacher)));
  const Floats<W> soft = e * splat<W>(s.student) * (u - splat<W>(s.shift));
  return fma(e1, splat<W>(s.one), where_nonzero(e, soft));
}

template <int kPower, bool kReverse, int W>
KDFAST_INLINE Floats<W> gradient_at(Scratch s, bool has_teacher, int64_t i, Slopes slopes) {
  const Floats<W> e = load<W>(s.e + i);
  const Floats<W> u = has_teacher ? load<W>(s.u + i) : splat<W>(0);
  const Floats<W> e1 = kPower == kPowerAny ? load<W>(s.e1 + i) : raise<kPower>(e);
  return gradient_of<kReverse>(e, u, e1, slopes);
}

// Writes the gradient of a row from the kept terms; without a teacher's terms u counts as zero.
template <int kPower, bool kReverse, int W, class T>
KDFAST_INLINE void write_gradient(Scratch s, bool has_teacher, int64_t n, Slopes slopes, bool around, T* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (around && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
      for (; i + kLanes <= n; i += kLanes) stream(out + i, gradient_at<kPower, kReverse, W>(s, has_teacher, i, slopes));
      stream_end();
    }
  }
  for (; i + kLanes <= n; i += kLanes) encode(out + i, gradient_at<kPower, kReverse, W>(s, has_teacher, i, slopes));
  if (i == n) return;
  if (n >= kLanes) {
    // The last full vector once more, where it ends with the row, is cheaper than part of one.
    encode(out + n - kLanes, gradient_at<kPower, kReverse, W>(s, has_teacher, n - kLanes, slopes));
  } else {
    encode_part(out, gradient_at<kPower, kReverse, W>(s, has_teacher, 0, slopes), n);
  }
}

// p is padded with zeros to a full vector.
template <int W>
KDFAST_INLINE double sum_row_body(const float* p, int64_t n) {
  Sum<W> s;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    for (int64_t i = begin; i < n && i < begin + kBlock; i += kLanes) s.add(load<W>(p + i));
    s.flush();
  }
  return s.total;
}

template <int W, class T>
KDFAST_INLINE void scale_body(const T* grad, T* out, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) encode(out + i, decode<W>(grad + i) * splat<W>(factor));
  if (i < n) encode_part(out + i, decode_part<W>(grad + i, n - i, 0.0f) * splat<W>(factor), n - i);
}

// clang-format off
#define KDFAST_ROW_KERNELS(suffix, W, attribute)                                                                                \
  template <class T> attribute float load_##suffix(const void* p, int64_t stride, int64_t n, float* out, bool copy) {         \
    return load_any<W>(static_cast<const T*>(p), stride, n, out, copy);                                                         \
  }                                                                                                                          \
  template <int P> attribute Sums student_##suffix(const float* z, int64_t n, float max_z, float inv_t, bool keep, Scratch s, \
                                                   const Ahead& ahead) { \
    return student_sums<P, W>(z, n, max_z, inv_t, keep, s, ahead);                                                                     \
  }                                                                                                                          \
  template <bool R, int P> attribute Sums pair_##suffix(const float* z, const float* t, int64_t n, float max_z, float max_t, \
                                                        float from_t, float inv_t, bool keep, Scratch s, \
                                                        const Ahead& ahead) {                   \
    return pair_sums<P, R, W>(z, t, n, max_z, max_t, from_t, inv_t, keep, s, ahead);                                                           \
  }                                                                                                                          \
  template <bool R, int P, class T> attribute void gradient_##suffix(Scratch s, bool has_teacher, int64_t n, Slopes slopes, bool around,  \
                                                                     void* out) {                                            \
    write_gradient<P, R, W>(s, has_teacher, n, slopes, around, static_cast<T*>(out));                                                   \
  }                                                                                                                          \
  template <class T> attribute void scale_##suffix(const void* grad, void* out, int64_t n, float factor) {                   \
    scale_body<W>(static_cast<const T*>(grad), static_cast<T*>(out), n, factor);                                                \
  }                                                                                                                          \
  attribute double sum_##suffix(const float* p, int64_t n) { return sum_row_body<W>(p, n); }                                  \
  attribute void logarithms_##suffix(double* x) { store(x, log_positive(load<W>(static_cast<const double*>(x)))); }
KDFAST_FOR_EACH_ISA(KDFAST_ROW_KERNELS)

#define KDFAST_BY_TYPE(f) {f<float>, f<BFloat16>, f<Float16>}
#define KDFAST_BY_POWER(f) {f<kPowerOne>, f<kPowerTwo>, f<kPowerFour>, f<kPowerAny>}
#define KDFAST_BY_POWER_OF(f, r) {f<r, kPowerOne>, f<r, kPowerTwo>, f<r, kPowerFour>, f<r, kPowerAny>}
#define KDFAST_GRADIENTS(f, r, p) {f<r, p, float>, f<r, p, BFloat16>, f<r, p, Float16>}
#define KDFAST_GRADIENTS_OF(f, r)                                                    \
  {KDFAST_GRADIENTS(f, r, kPowerOne), KDFAST_GRADIENTS(f, r, kPowerTwo),             \
   KDFAST_GRADIENTS(f, r, kPowerFour), KDFAST_GRADIENTS(f, r, kPowerAny)}
#define KDFAST_TABLE(suffix, W, attribute)                                              \
  const RowKernels table_##suffix = {                                                \
      KDFAST_BY_TYPE(load_##suffix),                                                 \
      KDFAST_BY_POWER(student_##suffix),                                             \
      {KDFAST_BY_POWER_OF(pair_##suffix, false), KDFAST_BY_POWER_OF(pair_##suffix, true)},      \
      {KDFAST_GRADIENTS_OF(gradient_##suffix, false), KDFAST_GRADIENTS_OF(gradient_##suffix, true)}, \
      KDFAST_BY_TYPE(scale_##suffix),                                                \
      sum_##suffix,                                                                  \
      logarithms_##suffix};
KDFAST_FOR_EACH_ISA(KDFAST_TABLE)
// clang-format on

}  // namespace

const RowKernels& row_kernels(int isa_limit) {
  const int level = isa_level(isa_limit);
  return KDFAST_PICK_ISA(level, table);
}

}  // namespace kdfast
