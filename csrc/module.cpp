// Unpacks arguments, releases the GIL, calls core.h.
#include <pybind11/pybind11.h>

#include "common/core.h"
#include "common/simd.h"

namespace py = pybind11;

namespace kdfast {

void bind_kd_call(py::module_& m);  // kd_call.cpp

void bind_head(py::module_& m);  // head_bindings.cpp

void bind_ghost(py::module_& m);  // ghost_bindings.cpp

const char* isa() {
  const char* names[] = {"default", "x86-64-v3", "x86-64-v4"};
  return names[isa_level()];
}

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, rows, columns, row stride, column stride, dtype code)
Matrix matrix(const py::tuple& t) {
  if (t.size() != 6) throw std::invalid_argument("a matrix is a tuple of six integers");
  return {at<const void>(t[0].cast<uintptr_t>()),
          t[1].cast<int64_t>(),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          t[4].cast<int64_t>(),
          t[5].cast<int>()};
}

void bind_kd_loss(py::module_& m) {
  m.def("kd_loss",
        [](const py::tuple& logits, const py::tuple& teacher, uintptr_t labels, int64_t labels_stride, uintptr_t rows,
           int64_t rows_stride, uintptr_t classes, uintptr_t tail, uintptr_t weights, bool use_ce, bool use_kl,
           bool reverse, double ce_factor, double kl_factor, double temperature, int64_t ignore_index, int reduction,
           double hold, uintptr_t loss, uintptr_t ce, uintptr_t kl, uintptr_t grad, int threads, int isa_limit) {
          const KdLoss args{matrix(logits),
                            matrix(teacher),
                            at<const int64_t>(labels),
                            labels_stride,
                            at<const int64_t>(rows),
                            rows_stride,
                            at<const int32_t>(classes),
                            at<const float>(tail),
                            at<const float>(weights),
                            use_ce,
                            use_kl,
                            reverse,
                            ce_factor,
                            kl_factor,
                            temperature,
                            ignore_index,
                            reduction,
                            hold,
                            at<float>(loss),
                            at<float>(ce),
                            at<float>(kl),
                            at<void>(grad),
                            threads,
                            isa_limit};
          py::gil_scoped_release release;
          kd_loss(args);
        });
  m.def("scale_rows", [](uintptr_t grad, uintptr_t out, int dtype, int64_t rows, int64_t cols, uintptr_t factor,
                         int64_t factor_stride, float scale, int threads) {
    py::gil_scoped_release release;
    scale_rows(at<const void>(grad), at<void>(out), dtype, rows, cols, at<const float>(factor), factor_stride, scale,
               threads);
  });
}

void bind_views(py::module_& m) {
  m.def("shift_views",
        [](uintptr_t images, uintptr_t moves, uintptr_t scale, uintptr_t bias, int64_t batch, int64_t height,
           int64_t width, int64_t pad, uintptr_t out, int dtype, int threads, int isa_limit) {
          const ShiftViews args{at<const uint8_t>(images),
                                at<const int32_t>(moves),
                                at<const float>(scale),
                                at<const float>(bias),
                                batch,
                                height,
                                width,
                                pad,
                                at<void>(out),
                                dtype,
                                threads,
                                isa_limit};
          py::gil_scoped_release release;
          shift_views(args);
        });
  m.def("shuffled_at", [](int64_t position, int64_t size, uintptr_t keys, int64_t count, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    shuffled_at(position, size, at<const uint64_t>(keys), count, at<int64_t>(out), threads);
  });
}

}  // namespace

}  // namespace kdfast

PYBIND11_MODULE(_native, m) {
  m.doc() = "kdfast's compiled kernels. Use them through kdfast.ops; pointers are not checked here.";
  m.def("isa", &kdfast::isa);
  kdfast::bind_kd_loss(m);
  kdfast::bind_kd_call(m);
  kdfast::bind_views(m);
  kdfast::bind_head(m);
  kdfast::bind_ghost(m);
#ifdef KDFAST_WITH_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
