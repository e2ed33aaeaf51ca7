// Checks of the operands of kd_loss.
#pragma once

#include "kd_loss/kd_loss.h"

namespace kdfast {

// Throws std::invalid_argument if sizes, dtypes or options are inconsistent.
void check_shapes(const KdLoss& args);

// Returns the sum of the weights of the non-ignored rows. Throws std::out_of_range if a label, teacher row or class id
// is out of range: as an index, it would read outside the tensors. Throws std::invalid_argument if alpha or the
// temperature of a row is.
double check_rows(const KdLoss& args);

// Throws std::invalid_argument that names the class that the teacher of row i repeats.
[[noreturn]] void raise_repeated_class(const KdLoss& args, int64_t i);

}  // namespace kdfast
