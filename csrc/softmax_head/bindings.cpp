// Binds the row operations of a softmax head: converts the arguments, releases the GIL and calls softmax_head.h.
#include <pybind11/pybind11.h>

#include "common/address.h"
#include "softmax_head/softmax_head.h"

namespace py = pybind11;

namespace kdfast {
namespace {

using namespace softmax_head;

// From (address, rows, classes, row stride, is double, alpha, temperature, threads, ISA limit).
Logits make_logits(const py::tuple& t) {
  if (t.size() != 9) throw std::invalid_argument("the logits of a head must be a tuple of nine numbers");
  return {pointer<const void>(t[0].cast<uintptr_t>()),
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

// `stream` is -1 for a CPU, else the address of a CUDA stream of the current device.
void bind_softmax_head(py::module_& m) {
  m.def("head_residuals",
        [](const py::tuple& head, uintptr_t labels, uintptr_t teacher, int64_t teacher_stride, uintptr_t features,
           int64_t width, int64_t features_stride, double extra, uintptr_t residuals, uintptr_t norms, int64_t stream) {
          const Residuals args{make_logits(head),
                               pointer<const int64_t>(labels),
                               pointer<const void>(teacher),
                               teacher_stride,
                               pointer<const void>(features),
                               width,
                               features_stride,
                               extra,
                               pointer<void>(residuals),
                               pointer<void>(norms)};
          py::gil_scoped_release release;
#ifdef KDFAST_WITH_CUDA
          if (stream >= 0) return compute_residuals_cuda(args, pointer<void>(static_cast<uintptr_t>(stream)));
#endif
          if (stream >= 0)
            throw std::invalid_argument(
                "this build has no CUDA kernels: build kdfast with nvcc on PATH, or pass CPU tensors");
          compute_residuals(args);
        });
  m.def("head_curvature",
        [](const py::tuple& head, uintptr_t products, int64_t vectors, int64_t stride, int64_t stream) {
          const Curvature args{make_logits(head), pointer<void>(products), vectors, stride};
          py::gil_scoped_release release;
#ifdef KDFAST_WITH_CUDA
          if (stream >= 0) return apply_curvature_cuda(args, pointer<void>(static_cast<uintptr_t>(stream)));
#endif
          if (stream >= 0)
            throw std::invalid_argument(
                "this build has no CUDA kernels: build kdfast with nvcc on PATH, or pass CPU tensors");
          apply_curvature(args);
        });
  m.def("head_products_fit", &hessian_products_fit);
  m.def("head_products", [](const py::tuple& head, uintptr_t features, int64_t width, int64_t features_stride,
                            bool bias, uintptr_t v, int64_t vectors, double scale, uintptr_t out) {
    const HessianProducts args{make_logits(head),
                               pointer<const float>(features),
                               width,
                               features_stride,
                               bias,
                               pointer<const float>(v),
                               vectors,
                               scale,
                               pointer<float>(out)};
    py::gil_scoped_release release;
    add_hessian_products(args);
  });
}

}  // namespace kdfast
