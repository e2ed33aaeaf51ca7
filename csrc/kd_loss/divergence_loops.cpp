#include "kd_loss/divergence_loops.h"

#include "common/dtype.h"
#include "common/simd.h"
#include "kd_loss/row_vectors.h"

namespace kdfast {
namespace {

struct MixtureRow {
  template <int W>
  KDFAST_INLINE static MixtureSums run(const float* z, const float* t, const float* z_end, const float* t_end,
                                       int64_t n, Mixture m, Scratch s) {
    Sum<W> teacher, student;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = begin + kBlock < n ? begin + kBlock : n;
      for (int64_t i = begin; i < end; i += kLanes) {
        const Floats<W> b = (load_padded<W>(z, z_end, i, n) - splat<W>(m.max_z)) * splat<W>(m.inv_t);
        const Floats<W> a = (load_padded<W>(t, t_end, i, n) - splat<W>(m.max_t)) * splat<W>(m.inv_t);
        const Floats<W> e = load<W>(s.e + i), u = load<W>(s.u + i);
        const Floats<W> log_m = log_positive(fma(e, splat<W>(m.student), u * splat<W>(m.beta)));
        const Floats<W> of_student = where_nonzero(e, (b + splat<W>(m.log_ratio)) - log_m);
        teacher.add_product(u, where_nonzero(u, a - log_m));
        student.add_product(e, of_student);
        store(s.u + i, of_student);
      }
      teacher.flush();
      student.flush();
    }
    return {teacher.total, student.total};
  }
};

struct SquaresOfRow {
  template <int W>
  KDFAST_INLINE static double run(const float* x, const float* end, int64_t n, float max, float mean) {
    Sum<W> sum;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      for (int64_t i = begin; i < n && i < begin + kBlock; i += kLanes) {
        const Floats<W> d = load_padded<W>(x, end, i, n) - splat<W>(max);
        const Floats<W> c = where_kept(d, d - splat<W>(mean));
        sum.add_product(c, c);
      }
      sum.flush();
    }
    return sum.total;
  }
};

template <bool kUseE1>
struct StandardizedRow {
  template <int W>
  KDFAST_INLINE static StandardizedSums run(const float* z, const float* t, int64_t n, Standardization student,
                                            Standardization teacher, StandardizedScratch s, const Prefetch& prefetch) {
    const Prefetch next = prefetch;  // a copy, which no store of the loop can change
    Sum<W> e1_sum, e_sum, u_sum, cross, of_student, of_teacher;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = begin + kBlock < n ? begin + kBlock : n;
      for (int64_t i = begin; i < end; i += kLanes) {
        prefetch_at(next, i);
        const Floats<W> d = load_padded<W>(z, s.e, i, n) - splat<W>(student.max);
        const Floats<W> b = d * splat<W>(student.scale);
        const Floats<W> a = (load_padded<W>(t, s.u, i, n) - splat<W>(teacher.max)) * splat<W>(teacher.scale);
        const Floats<W> e = exp_nonpositive(b), u = exp_nonpositive(a), kept = where_kept(d, b);
        e_sum.add(e);
        u_sum.add(u);
        cross.add_product(u, where_nonzero(u, a - b));
        of_student.add_product(e, kept);
        of_teacher.add_product(u, kept);
        store(s.e + i, e);
        store(s.u + i, u);
        store(s.centered + i, where_kept(d, d - splat<W>(student.mean)));
        if constexpr (kUseE1) {
          const Floats<W> e1 = exp_nonpositive(d);
          e1_sum.add(e1);
          store(s.e1 + i, e1);
        }
      }
      for (Sum<W>* sum : {&e1_sum, &e_sum, &u_sum, &cross, &of_student, &of_teacher}) sum->flush();
    }
    return {e1_sum.total, e_sum.total, u_sum.total, cross.total, of_student.total, of_teacher.total};
  }
};

template <int kLabels>
struct StandardizedVectors {
  StandardizedScratch s;
  StandardizedSlopes slopes;
  float subtracted;
  template <int W>
  KDFAST_INLINE Floats<W> at(int64_t i) const {
    const Floats<W> terms = fma(load<W>(s.e + i), splat<W>(slopes.e), load<W>(s.u + i) * splat<W>(-slopes.u));
    const Floats<W> g = fma(load<W>(s.centered + i), splat<W>(slopes.centered), terms);
    if constexpr (kLabels == kNoLabels) return g;
    const Floats<W> with_ce = fma(load<W>(s.e1 + i), splat<W>(slopes.e1), g);
    return kLabels == kSmoothed ? with_ce - splat<W>(subtracted) : with_ce;
  }
};

template <int kLabels, class T>
struct WriteStandardized {
  template <int W>
  KDFAST_INLINE static void run(StandardizedScratch s, int64_t n, StandardizedSlopes slopes, bool stream, void* out,
                                float subtracted) {
    write_row<W>(StandardizedVectors<kLabels>{s, slopes, subtracted}, n, stream, static_cast<T*>(out));
  }
};

template <class Isa, int kLabels>
constexpr void set_standardized_gradient(DivergenceKernels* k) {
  k->standardized_gradient[kLabels][kFloat32] = Isa::template run<WriteStandardized<kLabels, float>>;
  k->standardized_gradient[kLabels][kBFloat16] = Isa::template run<WriteStandardized<kLabels, BFloat16>>;
  k->standardized_gradient[kLabels][kFloat16] = Isa::template run<WriteStandardized<kLabels, Float16>>;
}

template <class Isa>
constexpr DivergenceKernels make_kernels() {
  DivergenceKernels k{};
  k.mixture = Isa::template run<MixtureRow>;
  k.squares = Isa::template run<SquaresOfRow>;
  k.standardized_sums[false] = Isa::template run<StandardizedRow<false>>;
  k.standardized_sums[true] = Isa::template run<StandardizedRow<true>>;
  set_standardized_gradient<Isa, kNoLabels>(&k);
  set_standardized_gradient<Isa, kOneHot>(&k);
  set_standardized_gradient<Isa, kSmoothed>(&k);
  return k;
}

constexpr DivergenceKernels kKernels[] = KDFAST_FOR_EACH_ISA(make_kernels);

}  // namespace

const DivergenceKernels& divergence_kernels(int isa_limit) { return kKernels[isa_level(isa_limit)]; }

}  // namespace kdfast
