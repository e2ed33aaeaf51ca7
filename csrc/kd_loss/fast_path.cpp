// kd_loss called with torch's tensors, looked at through DLPack's C functions: torch is not linked.
//
// At a hundred classes the kernel takes less time than the interpreter needs to check a call and to take its tensors
// apart. So the plainest calls are checked here; whatever is unusual is left to kdfast.ops.kd_loss, which takes any
// call and says what is wrong with it.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdlib>

#include "common/core.h"
#include "common/dlpack.h"
#include "common/dtype.h"
#include "common/simd.h"

namespace py = pybind11;

namespace kdfast {
namespace {

// What is needed of torch at each call; set once by `learn_torch`, and kept for good.
struct Torch {
  py::handle tensor, parameter;  // types, compared by identity
  py::handle scalar;             // a tensor: float32, on the CPU
  py::handle empty_like, grad_enabled, transforms_active, dispatch_modes, tracing_state;
  py::handle tensor_like;  // of kdfast.ops.kd_loss.gradient_buffer
  decltype(dlpack::ExchangeApi::view_of_object) view = nullptr;
} torch;

constexpr int64_t kLarge =
    1 << 20;  // bytes from which on memory is worth using again: see kdfast.ops.kd_loss.gradient_buffer

// Python objects that calls need again and again.
struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* native = PyUnicode_InternFromString("native");
  PyObject* one = PyFloat_FromDouble(1);
};

const Names& names() {
  static const Names interned;
  return interned;
}

py::object checked(PyObject* fresh) {
  if (!fresh) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(fresh);
}

py::object call(py::handle function) { return checked(PyObject_CallNoArgs(function.ptr())); }

py::object call(py::handle function, py::handle argument) {
  return checked(PyObject_CallOneArg(function.ptr(), argument.ptr()));
}

void* data_of(py::handle x) {
  return PyLong_AsVoidPtr(checked(PyObject_CallMethodNoArgs(x.ptr(), names().data_ptr)).ptr());
}

bool is_true(py::handle x) { return x.is(py::handle(Py_True)); }

bool requires_grad(py::handle x) { return is_true(checked(PyObject_GetAttr(x.ptr(), names().requires_grad))); }

// Whether its elements are those in memory with the other sign.
bool is_negated(py::handle x) { return is_true(checked(PyObject_CallMethodNoArgs(x.ptr(), names().is_neg))); }

// A CPU tensor of one or two dimensions, taken apart.
struct Operand {
  void* data;
  dlpack::Type type;
  int64_t sizes[2], strides[2];

  // Of dtype.h, or -1.
  int code() const {
    if (type.code == dlpack::kBfloat && type.bits == 16) return kBFloat16;
    if (type.code != dlpack::kFloat) return -1;
    return type.bits == 32 ? kFloat32 : type.bits == 16 ? kFloat16 : -1;
  }
  Matrix matrix() const { return {data, sizes[0], sizes[1], strides[0], strides[1], code()}; }
  bool contiguous() const { return strides[1] == 1 && strides[0] == sizes[1]; }
  int64_t bytes() const { return sizes[0] * sizes[1] * size_of(code()); }
};

// False if it is not a plain CPU tensor with that many dimensions.
bool read(py::handle x, int dims, Operand* out) {
  const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())));
  if (!type.is(torch.tensor) && !type.is(torch.parameter)) return false;
  dlpack::Tensor view;
  if (torch.view(x.ptr(), &view) != 0) {  // one without strides, such as a sparse one
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

// (n,) int64, or None.
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
  const double share = PyFloat_AS_DOUBLE(alpha.ptr()), t = PyFloat_AS_DOUBLE(temperature.ptr());
  int overflow = 0;
  a->reduction = reduction_of(reduction);
  a->ignore_index = PyLong_AsLongLongAndOverflow(ignore_index.ptr(), &overflow);
  a->reverse = equal(direction, "reverse");
  a->temperature = t;
  a->use_ce = share < 1;
  a->use_kl = share > 0;
  a->ce_factor = 1 - share;
  a->kl_factor = is_true(t_squared) ? share * (t * t) : share;
  return overflow == 0 && share >= 0 && share <= 1 && t >= 1e-15 && t <= 1e15 && a->reduction >= 0 &&
         (a->reverse || equal(direction, "forward"));
}

// A contiguous tensor like the logits, for their gradient.
py::object gradient_of(py::handle logits, const Operand& z) {
  if (z.contiguous() && z.bytes() < kLarge) return call(torch.empty_like, logits);
  return torch.tensor_like(logits, py::make_tuple(z.sizes[0], z.sizes[1]));
}

// Whether no transform, mode or trace wants to see what is called, and nothing but the native kernel was asked for.
bool undisturbed(py::handle backend) {
  return torch.view && equal(backend, "auto") && !std::getenv("KDFAST_BACKEND") &&
         !is_true(call(torch.transforms_active)) && PyLong_AsLong(call(torch.dispatch_modes).ptr()) == 0 &&
         call(torch.tracing_state).is_none();
}

// The loss, and what the backward pass needs: its gradient, the name of this backend and the power of two that the
// gradient is held by, which is one; or None in its place when nothing is to be differentiated. Both tensors are fresh.
// None when the call is not a plain one: a mean or a sum over CPU tensors in float32 or bfloat16, with a full teacher
// and without weights.
py::object kd_loss_of_tensors(py::handle logits, py::handle labels, py::handle teacher, py::handle rows,
                              py::handle alpha, py::handle temperature, py::handle t_squared, py::handle ignore_index,
                              py::handle reduction, py::handle backend, py::handle direction, int threads) {
  KdLoss a{};
  Operand z, t;
  if (!undisturbed(backend)) return py::none();
  if (!read_options(alpha, temperature, t_squared, ignore_index, reduction, direction, &a)) return py::none();
  if (!read(logits, 2, &z) || !read(teacher, 2, &t) || requires_grad(teacher)) return py::none();
  if (is_negated(logits) || is_negated(teacher)) return py::none();
  const bool fits = z.sizes[1] == t.sizes[1] && z.sizes[1] > 0 && (!rows.is_none() || t.sizes[0] == z.sizes[0]) &&
                    !(labels.is_none() && a.use_ce);
  // float16 gradients are held (see hold_of); other types run on the reference.
  if (!fits || t.code() < 0 || z.code() < 0 || z.code() == kFloat16) return py::none();
  if (!read_indices(labels, z.sizes[0], &a.labels, &a.labels_stride)) return py::none();
  if (!read_indices(rows, z.sizes[0], &a.rows, &a.rows_stride)) return py::none();
  a.logits = z.matrix();
  a.teacher = t.matrix();
  a.hold = 1;
  a.threads = threads;
  a.isa_limit = kWidestIsa;
  const py::object loss = call(torch.empty_like, torch.scalar);
  a.loss = static_cast<float*>(data_of(loss));
  py::object kept = py::none();
  if (requires_grad(logits) && is_true(call(torch.grad_enabled))) {
    const py::object grad = gradient_of(logits, z);
    a.grad = data_of(grad);
    kept = checked(PyTuple_Pack(3, grad.ptr(), names().native, names().one));
  }
  {
    py::gil_scoped_release release;
    kd_loss(a);
  }
  return checked(PyTuple_Pack(2, loss.ptr(), kept.ptr()));
}

}  // namespace

void bind_kd_call(py::module_& m) {
  m.def("learn_torch",
        [](const py::object& tensor, const py::object& parameter, const py::object& scalar, const py::list& functions) {
          py::handle* const known[] = {&torch.empty_like,     &torch.grad_enabled,  &torch.transforms_active,
                                       &torch.dispatch_modes, &torch.tracing_state, &torch.tensor_like};
          torch.tensor = tensor.inc_ref();
          torch.parameter = parameter.inc_ref();
          torch.scalar = scalar.inc_ref();
          size_t i = 0;
          for (const py::handle function : functions) *known[i++] = function.inc_ref();
          if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return;  // torch before 2.10: no call is a plain one
          const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
          const auto* api = static_cast<const dlpack::ExchangeApi*>(capsule.get_pointer());
          while (api && api->major != dlpack::kMajor) api = api->older;
          if (api) torch.view = api->view_of_object;
        });
  m.def("kd_loss_of_tensors", &kd_loss_of_tensors);
}

}  // namespace kdfast
