// Unpacks arguments, releases the GIL, calls head.h.
#include <pybind11/pybind11.h>

#include "softmax_head/softmax_head.h"

namespace py = pybind11;

namespace kdfast {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, rows, classes, row stride, wide, alpha, temperature, threads, isa limit)
HeadLogits head_logits(const py::tuple& t) {
  if (t.size() != 9) throw std::invalid_argument("logits of a head are a tuple of nine numbers");
  return {at<const void>(t[0].cast<uintptr_t>()),
          t[1].cast<int64_t>(),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          t[5].cast<double>(),
          t[6].cast<double>(),
          t[4].cast<bool>(),
          t[7].cast<int>(),
          t[8].cast<int>()};
}

}  // namespace

// `stream` is -1 on a CPU, else the address of a CUDA stream of the current device.
void bind_head(py::module_& m) {
  m.def("head_residuals",
        [](const py::tuple& head, uintptr_t labels, uintptr_t teacher, int64_t teacher_stride, uintptr_t features,
           int64_t width, int64_t features_stride, double extra, uintptr_t residuals, uintptr_t norms, int64_t stream) {
          const HeadResiduals args{head_logits(head),        at<const int64_t>(labels),
                                   at<const void>(teacher),  teacher_stride,
                                   at<const void>(features), width,
                                   features_stride,          extra,
                                   at<void>(residuals),      at<void>(norms)};
          py::gil_scoped_release release;
#ifdef KDFAST_WITH_CUDA
          if (stream >= 0) return head_residuals_cuda(args, at<void>(static_cast<uintptr_t>(stream)));
#endif
          if (stream >= 0) throw std::invalid_argument("this build has no CUDA kernels");
          head_residuals(args);
        });
  m.def("head_curvature",
        [](const py::tuple& head, uintptr_t products, int64_t vectors, int64_t stride, int64_t stream) {
          const HeadCurvature args{head_logits(head), at<void>(products), vectors, stride};
          py::gil_scoped_release release;
#ifdef KDFAST_WITH_CUDA
          if (stream >= 0) return head_curvature_cuda(args, at<void>(static_cast<uintptr_t>(stream)));
#endif
          if (stream >= 0) throw std::invalid_argument("this build has no CUDA kernels");
          head_curvature(args);
        });
  m.def("head_products_fit", &head_products_fit);
  m.def("head_products", [](const py::tuple& head, uintptr_t features, int64_t width, int64_t features_stride,
                            bool bias, uintptr_t v, int64_t vectors, double scale, uintptr_t out) {
    const HeadProducts args{
        head_logits(head), at<const float>(features), width, features_stride, bias, at<const float>(v), vectors, scale,
        at<float>(out)};
    py::gil_scoped_release release;
    head_products(args);
  });
}

}  // namespace kdfast
