// A shortcut for common calls of kd_loss: unpacks PyTorch's tensors through DLPack's C interface, so that PyTorch is
// not linked, checks the arguments and runs the kernel.
//
// At a hundred classes the kernel takes less time than Python needs to check and unpack the arguments; for the time
// saved, see kdfast/ops/kd_loss/fast_path.py. An unusual or invalid call is declined; kdfast.ops.kd_loss.api then takes
// the general path, which accepts every valid call and explains the errors of others.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdlib>

#include "common/dlpack.h"
#include "common/dtype.h"
#include "common/simd.h"
#include "kd_loss/kd_loss.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace kdfast {
namespace {

// Handles to PyTorch, set once by init_torch_handles and never released.
struct TorchHandles {
  py::handle tensor_type, parameter_type;  // compared by identity
  py::handle scalar;                       // a float32 CPU tensor without dimensions, the model of every loss
  py::handle empty_like, is_grad_enabled, transforms_active, dispatch_mode_count, tracing_state;
  py::handle new_gradient;  // of kdfast.ops.kd_loss.gradient_buffer
  decltype(dlpack::ExchangeApi::view_of_object) view_of_object = nullptr;
} torch;

// Gradients of this many bytes and more come from gradient_buffer, whose MIN_BYTES this is.
constexpr int64_t kMinBufferBytes = 1 << 20;

// Attribute names, interned once.
struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
};

const Names& names() {
  static const Names interned;
  return interned;
}

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object call(py::handle function) { return checked(PyObject_CallNoArgs(function.ptr())); }

py::object call(py::handle function, py::handle argument) {
  return checked(PyObject_CallOneArg(function.ptr(), argument.ptr()));
}

void* data_ptr(py::handle x) {
  return PyLong_AsVoidPtr(checked(PyObject_CallMethodNoArgs(x.ptr(), names().data_ptr)).ptr());
}

bool is_true(py::handle x) { return x.is(py::handle(Py_True)); }

bool requires_grad(py::handle x) { return is_true(checked(PyObject_GetAttr(x.ptr(), names().requires_grad))); }

// Whether the tensor is a lazily negated view of its memory.
bool is_negated(py::handle x) { return is_true(checked(PyObject_CallMethodNoArgs(x.ptr(), names().is_neg))); }

// A CPU tensor with one or two dimensions.
struct Operand {
  void* data;
  dlpack::Type type;
  int64_t sizes[2], strides[2];

  // Code of dtype.h, or -1.
  int dtype() const {
    if (type.code == dlpack::kBfloat && type.bits == 16) return kBFloat16;
    if (type.code != dlpack::kFloat) return -1;
    return type.bits == 32 ? kFloat32 : type.bits == 16 ? kFloat16 : -1;
  }
  Matrix matrix() const { return {data, sizes[0], sizes[1], strides[0], strides[1], dtype()}; }
  bool contiguous() const { return strides[1] == 1 && strides[0] == sizes[1]; }
  int64_t bytes() const { return sizes[0] * sizes[1] * size_of(dtype()); }
};

// Returns false if it is not a plain CPU tensor with that many dimensions.
bool read(py::handle x, int dims, Operand* out) {
  const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())));
  if (!type.is(torch.tensor_type) && !type.is(torch.parameter_type)) return false;
  dlpack::Tensor view;
  if (torch.view_of_object(x.ptr(), &view) != 0) {  // a tensor without strides, such as a sparse one
    PyErr_Clear();
    return false;
  }
  if (view.device_type != dlpack::kCpu || view.dims != dims || view.type.lanes != 1) return false;
  for (int i = 0; i < dims; ++i) {
    out->sizes[i] = view.shape[i];
    out->strides[i] = view.strides[i];
  }
  out->type = view.type;
  out->data = static_cast<char*>(view.data) + view.byte_offset;
  return true;
}

// Reads (n,) int64, or None.
bool read_indices(py::handle x, int64_t n, const int64_t** data, int64_t* stride) {
  if (x.is_none()) return true;
  Operand indices;
  if (!read(x, 1, &indices) || indices.type.code != dlpack::kInt || indices.type.bits != 64 || indices.sizes[0] != n)
    return false;
  *data = static_cast<const int64_t*>(indices.data);
  *stride = indices.strides[0];
  return true;
}

bool equal(py::handle text, const char* other) {
  return PyUnicode_Check(text.ptr()) && PyUnicode_CompareWithASCIIString(text.ptr(), other) == 0;
}

int reduction_of(py::handle text) { return equal(text, "mean") ? kMean : equal(text, "sum") ? kSum : -1; }

bool read_options(py::handle alpha, py::handle temperature, py::handle t_squared, py::handle ignore_index,
                  py::handle reduction, py::handle direction, KdLoss* a) {
  if (!PyFloat_CheckExact(alpha.ptr()) || !PyFloat_CheckExact(temperature.ptr()) || !PyBool_Check(t_squared.ptr()) ||
      !PyLong_CheckExact(ignore_index.ptr()))
    return false;
  const double weight = PyFloat_AS_DOUBLE(alpha.ptr()), t = PyFloat_AS_DOUBLE(temperature.ptr());
  int overflow = 0;
  a->reduction = reduction_of(reduction);
  a->ignore_index = PyLong_AsLongLongAndOverflow(ignore_index.ptr(), &overflow);
  a->reverse = equal(direction, "reverse");
  a->temperature = t;
  a->use_ce = weight < 1;
  a->use_kl = weight > 0;
  a->ce_factor = 1 - weight;
  a->kl_factor = is_true(t_squared) ? weight * (t * t) : weight;
  return overflow == 0 && weight >= 0 && weight <= 1 && t >= 1e-15 && t <= 1e15 && a->reduction >= 0 &&
         (a->reverse || equal(direction, "forward"));
}

bool is_float(py::handle x, double* value) {
  if (!PyFloat_CheckExact(x.ptr())) return false;
  *value = PyFloat_AS_DOUBLE(x.ptr());
  return true;
}

bool read_divergence(py::handle divergence, py::handle jsd_beta, py::handle dkd_weights, KdLoss* a) {
  if (equal(divergence, "kl")) return true;
  if (a->reverse) return false;
  if (equal(divergence, "standardized")) {
    a->divergence = kStandardized;
    return true;
  }
  double &first = a->first_weight, &second = a->second_weight;
  if (equal(divergence, "jsd")) {
    a->divergence = kJensenShannon;
    if (!is_float(jsd_beta, &first)) return false;
    second = 1 - first;
    return first > 0 && second > 0;
  }
  a->divergence = kDecoupled;
  return equal(divergence, "dkd") && PyTuple_CheckExact(dkd_weights.ptr()) &&
         PyTuple_GET_SIZE(dkd_weights.ptr()) == 2 && is_float(PyTuple_GET_ITEM(dkd_weights.ptr(), 0), &first) &&
         is_float(PyTuple_GET_ITEM(dkd_weights.ptr(), 1), &second) && first >= 0 && second >= 0 && first < HUGE_VAL &&
         second < HUGE_VAL;
}

// An uninitialized contiguous tensor for the gradient of the logits.
py::object new_gradient(py::handle logits, const Operand& z) {
  if (z.contiguous() && z.bytes() < kMinBufferBytes) return call(torch.empty_like, logits);
  return torch.new_gradient(logits, py::make_tuple(z.sizes[0], z.sizes[1]));
}

// Whether the native kernel may run without the dispatcher: no transform, mode or trace is active, and no other backend
// was requested.
bool is_plain(py::handle backend) {
  return torch.view_of_object && equal(backend, "auto") && !std::getenv("KDFAST_BACKEND") &&
         !is_true(call(torch.transforms_active)) && PyLong_AsLong(call(torch.dispatch_mode_count).ptr()) == 0 &&
         call(torch.tracing_state).is_none();
}

// Returns None for a call that is not plain, else the loss and its gradient (None if nothing is differentiated). Plain
// is a mean or a sum over CPU tensors with float32 or bfloat16 logits and a teacher with all classes, without weights.
// float16 is left out because its gradient is stored scaled (KDCall.grad_scale).
py::object fast_kd_loss(py::handle logits, py::handle labels, py::handle teacher, py::handle rows, py::handle alpha,
                        py::handle temperature, py::handle t_squared, py::handle ignore_index, py::handle reduction,
                        py::handle direction, py::handle backend, py::handle divergence, py::handle jsd_beta,
                        py::handle dkd_weights, py::handle label_smoothing, int threads) {
  KdLoss a{};
  Operand z, t;
  if (!is_plain(backend)) return py::none();
  if (!read_options(alpha, temperature, t_squared, ignore_index, reduction, direction, &a)) return py::none();
  if (!read_divergence(divergence, jsd_beta, dkd_weights, &a)) return py::none();
  if (!is_float(label_smoothing, &a.label_smoothing) || !(a.label_smoothing >= 0 && a.label_smoothing < 1))
    return py::none();
  if (!read(logits, 2, &z) || !read(teacher, 2, &t) || requires_grad(teacher)) return py::none();
  if (is_negated(logits) || is_negated(teacher)) return py::none();
  const bool fits = z.sizes[1] == t.sizes[1] && z.sizes[1] > 0 && (!rows.is_none() || t.sizes[0] == z.sizes[0]) &&
                    !(labels.is_none() && (a.use_ce || a.divergence == kDecoupled));
  if (!fits || t.dtype() < 0 || z.dtype() < 0 || z.dtype() == kFloat16) return py::none();
  if (!read_indices(labels, z.sizes[0], &a.labels, &a.labels_stride)) return py::none();
  if (!read_indices(rows, z.sizes[0], &a.rows, &a.rows_stride)) return py::none();
  a.logits = z.matrix();
  a.teacher = t.matrix();
  a.grad_scale = 1;
  a.threads = threads;
  a.isa_limit = kWidestIsa;
  const py::object loss = call(torch.empty_like, torch.scalar);
  a.loss = static_cast<float*>(data_ptr(loss));
  py::object grad = py::none();
  if (requires_grad(logits) && is_true(call(torch.is_grad_enabled))) {
    grad = new_gradient(logits, z);
    a.grad = data_ptr(grad);
  }
  {
    py::gil_scoped_release release;
    kd_loss(a);
  }
  return checked(PyTuple_Pack(2, loss.ptr(), grad.ptr()));
}

void init_torch_handles(const py::object& tensor_type, const py::object& parameter_type, const py::object& scalar,
                        const py::object& empty_like, const py::object& is_grad_enabled,
                        const py::object& transforms_active, const py::object& dispatch_mode_count,
                        const py::object& tracing_state, const py::object& new_gradient) {
  torch.tensor_type = tensor_type.inc_ref();
  torch.parameter_type = parameter_type.inc_ref();
  torch.scalar = scalar.inc_ref();
  torch.empty_like = empty_like.inc_ref();
  torch.is_grad_enabled = is_grad_enabled.inc_ref();
  torch.transforms_active = transforms_active.inc_ref();
  torch.dispatch_mode_count = dispatch_mode_count.inc_ref();
  torch.tracing_state = tracing_state.inc_ref();
  torch.new_gradient = new_gradient.inc_ref();
  if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return;  // PyTorch before 2.10: no call is plain
  const py::capsule capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const dlpack::ExchangeApi*>(capsule.get_pointer());
  while (api && api->major != dlpack::kMajor) api = api->older;
  if (api) torch.view_of_object = api->view_of_object;
}

}  // namespace

void bind_kd_loss_fast(py::module_& m) {
  m.def("init_torch_handles", &init_torch_handles, py::kw_only(), "tensor_type"_a, "parameter_type"_a, "scalar"_a,
        "empty_like"_a, "is_grad_enabled"_a, "transforms_active"_a, "dispatch_mode_count"_a, "tracing_state"_a,
        "new_gradient"_a, "Functions and types of PyTorch that fast_kd_loss needs.");
  m.def("fast_kd_loss", &fast_kd_loss, "Loss and gradient of a plain call, or None.");
}

}  // namespace kdfast
