// Python bindings of the views and the permutations: unpack the arguments, release the interpreter lock, call.
#include <pybind11/pybind11.h>

#include "common/address.h"
#include "views/views.h"

namespace py = pybind11;

namespace kdfast {

void bind_views(py::module_& m) {
  m.def("gather_views", [](uintptr_t images, uintptr_t rows, uintptr_t view_ids, uintptr_t scale, uintptr_t bias,
                           int64_t count, int64_t batch, int64_t height, int64_t width, int64_t pad, bool flip,
                           uintptr_t out, int dtype, int threads, int isa_limit) {
    const GatherViews args{pointer<const uint8_t>(images),
                           pointer<const int64_t>(rows),
                           pointer<const int64_t>(view_ids),
                           pointer<const float>(scale),
                           pointer<const float>(bias),
                           count,
                           batch,
                           height,
                           width,
                           pad,
                           flip,
                           pointer<void>(out),
                           dtype,
                           threads,
                           isa_limit};
    py::gil_scoped_release release;
    gather_views(args);
  });
  m.def("crop_views", [](uintptr_t images, uintptr_t rows, uintptr_t boxes, uintptr_t scale, uintptr_t bias,
                         int64_t count, int64_t batch, int64_t height, int64_t width, int64_t out_height,
                         int64_t out_width, uintptr_t out, int dtype, int threads, int isa_limit) {
    const CropViews args{pointer<const uint8_t>(images),
                         pointer<const int64_t>(rows),
                         pointer<const int32_t>(boxes),
                         pointer<const float>(scale),
                         pointer<const float>(bias),
                         count,
                         batch,
                         height,
                         width,
                         out_height,
                         out_width,
                         pointer<void>(out),
                         dtype,
                         threads,
                         isa_limit};
    py::gil_scoped_release release;
    crop_views(args);
  });
  m.def("shuffled_at", [](int64_t position, int64_t size, uintptr_t keys, int64_t count, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    shuffled_at(position, size, pointer<const uint64_t>(keys), count, pointer<int64_t>(out), threads);
  });
}

}  // namespace kdfast
