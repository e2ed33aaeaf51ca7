// Addresses of tensors, as Python passes them.
#pragma once

#include <cstdint>

namespace kdfast {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace kdfast
