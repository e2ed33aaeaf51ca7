// Vector loops over one row of logits: largest element, sums of exponentials, gradient; compiled once per instruction set.
#include "kd_rows.h"

#include "dtype.h"
#include "simd.h"

namespace kdfast {
namespace {

constexpr int64_t kBlock = 1024;  // elements whose float sums are added up before they go into a double

template <int kPower>
KDFAST_INLINE VecF raise(VecF e) {
  if constexpr (kPower >= 1) e *= e;
  if constexpr (kPower >= 2) e *= e;
  return e;
}

KDFAST_INLINE VecF load_part(const float* p, int64_t i, int64_t n, float fill) {
  return i + kLanes <= n ? load(p + i) : decode_part(p + i, n - i, fill);
}

// Largest of n elements. Writes them as floats to `out`, padded with -inf to full vectors, unless out is null.
template <class T>
KDFAST_INLINE float load_row(const T* p, int64_t stride, int64_t n, float* out) {
  VecF m = splat(-kInf), m2 = m;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const VecF a = decode(p + i), b = decode(p + i + kLanes);
      m = max(a, m);
      m2 = max(b, m2);
      if (out) store(out + i, a), store(out + i + kLanes, b);
    }
  }
  for (; i < n; i += kLanes) {
    T part[kLanes] = {};
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    for (int64_t j = 0; j < count; ++j) part[j] = p[(i + j) * stride];
    const VecF a = decode_part(part, count, -kInf);
    m = max(a, m);
    if (out) store(out + i, a);
  }
  return max_of(max(m, m2));
}

// Sums of a student's row. e and e1 receive the terms when they are not null; they may be the row itself.
template <int kPower>
KDFAST_INLINE Sums student_sums(const float* z, int64_t n, float max_z, float inv_t, float* e_out, float* e1_out) {
  Sum one, student;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    for (int64_t i = begin; i < end; i += kLanes) {
      const VecF d = load_part(z, i, n, -kInf) - max_z;
      const VecF e = exp_nonpositive(d * inv_t);
      const VecF e1 = kPower == kPowerAny ? exp_nonpositive(d) : raise<kPower>(e);
      student.add(e);
      one.add(e1);
      if (e_out) store(e_out + i, e);
      if (kPower == kPowerAny && e1_out) store(e1_out + i, e1);
    }
    student.flush();
    one.flush();
  }
  return {one.total, student.total, 0, 0};
}

// Sums of a student's and a teacher's row. Unless e_out is null, e, u = exp((t - max t) / T) (b - a
// when kReverse) and e1 are kept.
template <int kPower, bool kReverse>
KDFAST_INLINE Sums pair_sums(const float* z, const float* t, int64_t n, float max_z, float max_t, float inv_t, float* e_out,
                             float* u_out, float* e1_out) {
  Sum one, student, teacher, cross;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    for (int64_t i = begin; i < end; i += kLanes) {
      const VecF d = load_part(z, i, n, -kInf) - max_z;
      const VecF b = d * inv_t;
      const VecF a = (load_part(t, i, n, -kInf) - max_t) * inv_t;
      const VecF e = exp_nonpositive(b);
      const VecF e1 = kPower == kPowerAny ? exp_nonpositive(d) : raise<kPower>(e);
      const VecF u = exp_nonpositive(a);
      student.add(e);
      one.add(e1);
      teacher.add(u);
      // A class of probability zero adds nothing, even where the other side's logarithm is infinite.
      const VecF weight = kReverse ? e : u;
      const VecF gap = kReverse ? b - a : a - b;
      cross.add(weight == VecF{} ? VecF{} : weight * gap);
      if (e_out) {
        store(e_out + i, e);
        store(u_out + i, kReverse ? gap : u);
        if (kPower == kPowerAny) store(e1_out + i, e1);
      }
    }
    student.flush();
    one.flush();
    teacher.flush();
    cross.flush();
  }
  return {one.total, student.total, teacher.total, cross.total};
}

template <int kPower, bool kReverse>
KDFAST_INLINE VecF gradient_of(VecF e, VecF u, VecF e1, Slopes s) {
  const VecF hard = e1 * s.one;
  if constexpr (!kReverse) return hard + (e * s.student - u * s.teacher);
  const VecF soft = e * s.student * (u - s.shift);
  return hard + (e == VecF{} ? VecF{} : soft);
}

// Writes the gradient of a row from the kept terms; without a teacher's terms (u null) u counts as zero.
template <int kPower, bool kReverse, class T>
KDFAST_INLINE void write_gradient(const float* e_row, const float* u_row, const float* e1_row, int64_t n, Slopes s, T* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF e = load(e_row + i);
    const VecF u = u_row ? load(u_row + i) : VecF{};
    const VecF e1 = kPower == kPowerAny ? load(e1_row + i) : raise<kPower>(e);
    const VecF g = gradient_of<kPower, kReverse>(e, u, e1, s);
    if (i + kLanes <= n) {
      encode(out + i, g);
    } else {
      encode_part(out + i, g, n - i);
    }
  }
}

KDFAST_INLINE double sum_row_body(const float* p, int64_t n) {
  Sum s;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    for (int64_t i = begin; i < n && i < begin + kBlock; i += kLanes) s.add(load_part(p, i, n, 0.0f));
    s.flush();
  }
  return s.total;
}

template <class T>
KDFAST_INLINE void scale_body(const T* grad, T* out, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) encode(out + i, decode(grad + i) * factor);
  if (i < n) encode_part(out + i, decode_part(grad + i, n - i, 0.0f) * factor, n - i);
}

// clang-format off
#define KDFAST_ROW_KERNELS(suffix, attribute)                                                                                \
  template <class T> attribute float load_##suffix(const void* p, int64_t stride, int64_t n, float* out) {                   \
    return load_row(static_cast<const T*>(p), stride, n, out);                                                               \
  }                                                                                                                          \
  template <int P> attribute Sums student_##suffix(const float* z, int64_t n, float max_z, float inv_t, float* e, float* e1) { \
    return student_sums<P>(z, n, max_z, inv_t, e, e1);                                                                       \
  }                                                                                                                          \
  template <bool R, int P> attribute Sums pair_##suffix(const float* z, const float* t, int64_t n, float max_z, float max_t, \
                                                        float inv_t, float* e, float* u, float* e1) {                        \
    return pair_sums<P, R>(z, t, n, max_z, max_t, inv_t, e, u, e1);                                                          \
  }                                                                                                                          \
  template <bool R, int P, class T> attribute void gradient_##suffix(const float* e, const float* u, const float* e1,        \
                                                                     int64_t n, Slopes s, void* out) {                       \
    write_gradient<P, R>(e, u, e1, n, s, static_cast<T*>(out));                                                              \
  }                                                                                                                          \
  template <class T> attribute void scale_##suffix(const void* grad, void* out, int64_t n, float factor) {                   \
    scale_body(static_cast<const T*>(grad), static_cast<T*>(out), n, factor);                                                \
  }                                                                                                                          \
  attribute double sum_##suffix(const float* p, int64_t n) { return sum_row_body(p, n); }
KDFAST_FOR_EACH_ISA(KDFAST_ROW_KERNELS)

#define KDFAST_BY_TYPE(f) {f<float>, f<BFloat16>, f<Float16>}
#define KDFAST_BY_POWER(f) {f<kPowerOne>, f<kPowerTwo>, f<kPowerFour>, f<kPowerAny>}
#define KDFAST_BY_POWER_OF(f, r) {f<r, kPowerOne>, f<r, kPowerTwo>, f<r, kPowerFour>, f<r, kPowerAny>}
#define KDFAST_GRADIENTS(f, r, p) {f<r, p, float>, f<r, p, BFloat16>, f<r, p, Float16>}
#define KDFAST_GRADIENTS_OF(f, r)                                                    \
  {KDFAST_GRADIENTS(f, r, kPowerOne), KDFAST_GRADIENTS(f, r, kPowerTwo),             \
   KDFAST_GRADIENTS(f, r, kPowerFour), KDFAST_GRADIENTS(f, r, kPowerAny)}
#define KDFAST_TABLE(suffix, attribute)                                              \
  const RowKernels table_##suffix = {                                                \
      KDFAST_BY_TYPE(load_##suffix),                                                 \
      KDFAST_BY_POWER(student_##suffix),                                             \
      {KDFAST_BY_POWER_OF(pair_##suffix, false), KDFAST_BY_POWER_OF(pair_##suffix, true)},      \
      {KDFAST_GRADIENTS_OF(gradient_##suffix, false), KDFAST_GRADIENTS_OF(gradient_##suffix, true)}, \
      KDFAST_BY_TYPE(scale_##suffix),                                                \
      sum_##suffix};
KDFAST_FOR_EACH_ISA(KDFAST_TABLE)
// clang-format on

}  // namespace

const RowKernels& row_kernels(int isa_limit) {
  const int level = isa_level(isa_limit);
  return KDFAST_PICK_ISA(level, table);
}

}  // namespace kdfast
