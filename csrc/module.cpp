// The extension module kdfast._native. Each operator binds its functions in its own file.
#include <pybind11/pybind11.h>

#include "common/simd.h"

namespace kdfast {

void bind_kd_loss(pybind11::module_& m);       // kd_loss/bindings.cpp
void bind_kd_loss_fast(pybind11::module_& m);  // kd_loss/fast_path.cpp
void bind_grad_norms(pybind11::module_& m);    // grad_norms/bindings.cpp
void bind_softmax_head(pybind11::module_& m);  // softmax_head/bindings.cpp
void bind_views(pybind11::module_& m);         // views/bindings.cpp

namespace {

const char* isa() {
  const char* names[] = {"default", "x86-64-v3", "x86-64-v4"};
  return names[isa_level()];
}

}  // namespace
}  // namespace kdfast

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of kdfast. Call them through kdfast.ops: addresses are not checked here.";
  m.def("isa", &kdfast::isa, "Widest instruction set that the kernels use here.");
  kdfast::bind_kd_loss(m);
  kdfast::bind_kd_loss_fast(m);
  kdfast::bind_grad_norms(m);
  kdfast::bind_softmax_head(m);
  kdfast::bind_views(m);
#ifdef KDFAST_WITH_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
