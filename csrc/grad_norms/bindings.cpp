// Unpacks the arguments of the per-sample gradient norms, releases the GIL, calls ghost.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "grad_norms/grad_norms.h"

namespace py = pybind11;

namespace kdfast {

namespace {

using Two = std::array<int64_t, 2>;
using Four = std::array<int64_t, 4>;

GhostConv call(uintptr_t a, const Four& a_strides, uintptr_t b, const Four& b_strides,
               const std::array<int64_t, 7>& sizes, const Two& kernel, const Two& stride, const Two& dilation,
               const Two& pad, int64_t groups, int way) {
  GhostConv args{};
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
  args.way = way;
  ghost_check(args);
  return args;
}

}  // namespace

// A GhostConv holds addresses: the caller keeps the tensors alive. sizes: batch, channels, height, width, outputs,
// out_height, out_width.
void bind_ghost(py::module_& m) {
  py::class_<GhostConv>(m, "GhostConv").def(py::init(&call));
  m.def("ghost_conv", [](GhostConv args, uintptr_t out, int threads, int isa_limit) {
    args.out = reinterpret_cast<double*>(out);
    args.threads = threads;
    args.isa_limit = isa_limit;
    py::gil_scoped_release release;
    ghost_conv(args);
  });
#ifdef KDFAST_WITH_CUDA
  m.def("ghost_parts", &ghost_parts);
  m.def("ghost_conv_cuda", [](GhostConv args, uintptr_t out, uintptr_t stream) {
    args.out = reinterpret_cast<double*>(out);
    py::gil_scoped_release release;
    ghost_conv_cuda(args, reinterpret_cast<void*>(stream));
  });
#endif
}

}  // namespace kdfast
