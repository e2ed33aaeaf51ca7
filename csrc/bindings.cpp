// The only pybind11 file: unpack arguments, release the GIL, call core.h.
#include <pybind11/pybind11.h>

#include "core.h"

namespace py = pybind11;

namespace kdfast {

const char* isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return "x86-64-v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
#endif
  return "default";
}

}  // namespace kdfast

PYBIND11_MODULE(_native, m) {
  m.doc() = "kdfast's compiled kernels. Use them through kdfast.ops; pointers are not checked here.";
  m.def("isa", &kdfast::isa);
#ifdef KDFAST_WITH_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
