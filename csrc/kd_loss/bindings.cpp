// Python bindings of kd_loss: unpack the arguments, release the interpreter lock, call the kernel.
#include <pybind11/pybind11.h>

#include <tuple>

#include "common/address.h"
#include "kd_loss/kd_loss.h"

namespace py = pybind11;

namespace kdfast {

namespace {

// Arguments come in groups of tuples: pybind11 takes three times as long for two dozen keywords.
using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int>;  // address, sizes, strides, dtype
using VectorTuple = std::tuple<uintptr_t, int64_t>;                                  // address, stride
using TopKTuple = std::tuple<uintptr_t, uintptr_t>;                                  // classes, tail
using TermsTuple = std::tuple<bool, bool, bool, double, double, double>;     // use_ce to temperature, as in KdLoss
using NumbersTuple = std::tuple<uintptr_t, uintptr_t, double, bool>;         // alphas, temperatures, alpha, t_squared
using DivergenceTuple = std::tuple<int, double, double>;                     // divergence and the weights of its parts
using OutputTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;  // loss, ce, kl, grad

Matrix matrix(const MatrixTuple& t) {
  const auto& [address, rows, cols, row_stride, col_stride, dtype] = t;
  return {pointer<const void>(address), rows, cols, row_stride, col_stride, dtype};
}

void call_kd_loss(const MatrixTuple& logits, const MatrixTuple& teacher, const VectorTuple& labels,
                  const VectorTuple& rows, const TopKTuple& topk, uintptr_t weights, const TermsTuple& terms,
                  const NumbersTuple& numbers, const DivergenceTuple& divergence, double label_smoothing,
                  int64_t ignore_index, int reduction, double grad_scale, const OutputTuple& outputs, int threads,
                  int isa_limit) {
  KdLoss args{};
  args.logits = matrix(logits);
  args.teacher = matrix(teacher);
  args.labels = pointer<const int64_t>(std::get<0>(labels));
  args.labels_stride = std::get<1>(labels);
  args.rows = pointer<const int64_t>(std::get<0>(rows));
  args.rows_stride = std::get<1>(rows);
  args.classes = pointer<const int32_t>(std::get<0>(topk));
  args.tail = pointer<const float>(std::get<1>(topk));
  args.weights = pointer<const float>(weights);
  std::tie(args.use_ce, args.use_kl, args.reverse, args.ce_factor, args.kl_factor, args.temperature) = terms;
  const auto& [alphas, temperatures, alpha, t_squared] = numbers;
  args.alphas = pointer<const double>(alphas);
  args.temperatures = pointer<const double>(temperatures);
  args.alpha = alpha;
  args.t_squared = t_squared;
  args.label_smoothing = label_smoothing;
  std::tie(args.divergence, args.first_weight, args.second_weight) = divergence;
  args.ignore_index = ignore_index;
  args.reduction = reduction;
  args.grad_scale = grad_scale;
  const auto& [loss, ce, kl, grad] = outputs;
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
  m.def("kd_loss", &call_kd_loss, "Loss and gradient; an address is 0 for a tensor that is left out.");
  m.def("scale_rows", [](uintptr_t grad, uintptr_t out, int dtype, int64_t rows, int64_t cols,
                         const VectorTuple& factor, float scale, int threads) {
    py::gil_scoped_release release;
    scale_rows(pointer<const void>(grad), pointer<void>(out), dtype, rows, cols,
               pointer<const float>(std::get<0>(factor)), std::get<1>(factor), scale, threads);
  });
}

}  // namespace kdfast
