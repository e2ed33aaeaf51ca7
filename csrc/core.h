// The whole C++ surface of kdfast: plain functions over pointers, sizes, strides and dtype codes.
#pragma once

#include <cstdint>

namespace kdfast {

// Name of the widest instruction set the function clones will use on this machine: "x86-64-v4", "x86-64-v3" or "default".
const char* isa();

}  // namespace kdfast
