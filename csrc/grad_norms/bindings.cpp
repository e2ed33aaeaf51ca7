// Binds the per-sample gradient norms: converts the arguments, releases the GIL and calls grad_norms.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "grad_norms/grad_norms.h"

namespace py = pybind11;

namespace kdfast {
namespace {

using grad_norms::Convolution;
using Pair = std::array<int64_t, 2>;
using Strides = std::array<int64_t, 4>;

// sizes: batch, channels, height, width, outputs, out_height, out_width.
Convolution make_convolution(uintptr_t a, const Strides& a_strides, uintptr_t b, const Strides& b_strides,
                             const std::array<int64_t, 7>& sizes, const Pair& kernel, const Pair& stride,
                             const Pair& dilation, const Pair& pad, int64_t groups, int algorithm, uintptr_t weights,
                             uintptr_t squares) {
  Convolution args{};
  args.a = reinterpret_cast<const float*>(a);
  args.b = reinterpret_cast<const float*>(b);
  std::copy(a_strides.begin(), a_strides.end(), args.a_strides);
  std::copy(b_strides.begin(), b_strides.end(), args.b_strides);
  std::tie(args.batch, args.channels, args.height, args.width, args.outputs, args.out_height, args.out_width) =
      std::tuple_cat(sizes);
  std::copy(kernel.begin(), kernel.end(), args.kernel);
  std::copy(stride.begin(), stride.end(), args.stride);
  std::copy(dilation.begin(), dilation.end(), args.dilation);
  std::copy(pad.begin(), pad.end(), args.pad);
  args.groups = groups;
  args.algorithm = algorithm;
  args.weights = reinterpret_cast<const float*>(weights);
  args.squares = reinterpret_cast<double*>(squares);
  grad_norms::check(args);
  return args;
}

}  // namespace

// A Convolution holds addresses: the caller must keep the tensors alive.
void bind_grad_norms(py::module_& m) {
  py::class_<Convolution>(m, "Convolution").def(py::init(&make_convolution));
  m.def("conv_squared_norms", [](Convolution args, uintptr_t out, int threads, int isa_limit) {
    args.out = reinterpret_cast<double*>(out);
    args.threads = threads;
    args.isa_limit = isa_limit;
    py::gil_scoped_release release;
    grad_norms::squared_norms(args);
  });
#ifdef KDFAST_WITH_CUDA
  m.def("conv_squared_norms_parts", &grad_norms::parts);
  m.def("conv_sums_of_squares_parts", &grad_norms::squares_parts);
  m.def("conv_squared_norms_cuda", [](Convolution args, uintptr_t out, uintptr_t stream) {
    args.out = reinterpret_cast<double*>(out);
    py::gil_scoped_release release;
    grad_norms::squared_norms_cuda(args, reinterpret_cast<void*>(stream));
  });
#endif
}

}  // namespace kdfast
