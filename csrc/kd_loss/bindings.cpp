// Python bindings of kd_loss: unpack the arguments, release the interpreter lock, call the kernel.
#include <pybind11/pybind11.h>

#include "kd_loss/kd_loss.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace kdfast {

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, rows, columns, row stride, column stride, dtype code)
Matrix matrix(const py::tuple& t) {
  if (t.size() != 6) throw std::invalid_argument("a matrix is a tuple of six integers");
  return {pointer<const void>(t[0].cast<uintptr_t>()),
          t[1].cast<int64_t>(),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          t[4].cast<int64_t>(),
          t[5].cast<int>()};
}

void call_kd_loss(const py::tuple& logits, const py::tuple& teacher, uintptr_t labels, int64_t labels_stride,
                  uintptr_t rows, int64_t rows_stride, uintptr_t classes, uintptr_t tail, uintptr_t weights,
                  bool use_ce, bool use_kl, bool reverse, double ce_factor, double kl_factor, double temperature,
                  int64_t ignore_index, int reduction, double grad_scale, uintptr_t loss, uintptr_t ce, uintptr_t kl,
                  uintptr_t grad, int threads, int isa_limit) {
  KdLoss args{};
  args.logits = matrix(logits);
  args.teacher = matrix(teacher);
  args.labels = pointer<const int64_t>(labels);
  args.labels_stride = labels_stride;
  args.rows = pointer<const int64_t>(rows);
  args.rows_stride = rows_stride;
  args.classes = pointer<const int32_t>(classes);
  args.tail = pointer<const float>(tail);
  args.weights = pointer<const float>(weights);
  args.use_ce = use_ce;
  args.use_kl = use_kl;
  args.reverse = reverse;
  args.ce_factor = ce_factor;
  args.kl_factor = kl_factor;
  args.temperature = temperature;
  args.ignore_index = ignore_index;
  args.reduction = reduction;
  args.grad_scale = grad_scale;
  args.loss = pointer<float>(loss);
  args.ce = pointer<float>(ce);
  args.kl = pointer<float>(kl);
  args.grad = pointer<void>(grad);
  args.threads = threads;
  args.isa_limit = isa_limit;
  py::gil_scoped_release release;
  kd_loss(args);
}

}  // namespace

void bind_kd_loss(py::module_& m) {
  m.def("kd_loss", &call_kd_loss, py::kw_only(), "logits"_a, "teacher"_a, "labels"_a, "labels_stride"_a, "rows"_a,
        "rows_stride"_a, "classes"_a, "tail"_a, "weights"_a, "use_ce"_a, "use_kl"_a, "reverse"_a, "ce_factor"_a,
        "kl_factor"_a, "temperature"_a, "ignore_index"_a, "reduction"_a, "grad_scale"_a, "loss"_a, "ce"_a, "kl"_a,
        "grad"_a, "threads"_a, "isa_limit"_a, "Loss and gradient; addresses are 0 for what is left out.");
  m.def(
      "scale_rows",
      [](uintptr_t grad, uintptr_t out, int dtype, int64_t rows, int64_t cols, uintptr_t factor, int64_t factor_stride,
         float scale, int threads) {
        py::gil_scoped_release release;
        scale_rows(pointer<const void>(grad), pointer<void>(out), dtype, rows, cols, pointer<const float>(factor),
                   factor_stride, scale, threads);
      },
      py::kw_only(), "grad"_a, "out"_a, "dtype"_a, "rows"_a, "cols"_a, "factor"_a, "factor_stride"_a, "scale"_a,
      "threads"_a, "out = grad * factor * scale, row by row.");
}

}  // namespace kdfast
