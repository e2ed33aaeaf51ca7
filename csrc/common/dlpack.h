// The part of DLPack's C interface that reads a Python tensor's address, sizes and strides without calling Python.
//
// Source: DLPack 1.3, https://dmlc.github.io/dlpack/latest/c_api.html; the layouts are fixed within a major version.
#pragma once

#include <cstdint>

namespace kdfast::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  Type type;
  int64_t *shape, *strides;  // strides count elements
  uint64_t byte_offset;
};

// Target of the capsule `type(tensor).__dlpack_c_exchange_api__`, which is named "dlpack_exchange_api".
struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_of_object)(void* object, Tensor* out);  // may be null; returns 0, or -1 with a Python exception set
  void* current_stream;
};

}  // namespace kdfast::dlpack
