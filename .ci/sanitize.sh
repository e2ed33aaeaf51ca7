#!/usr/bin/env bash
# Build the C++ kernels with the address and undefined-behavior sanitizers and run the operators' tests on them.
#
#     make sanitize
#     TESTS="tests/ops/kd_loss/test_bits.py" make sanitize
#
# PYTHON  an interpreter with kdfast's development requirements; default: .venv/bin/python
# TESTS   tests to run; default: tests/ops, without those of Triton, GPUs and torch.compile
#
# The build is in build/sanitize; the installed package is left alone. Needs GCC and its libasan.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$python")
build=build/sanitize
tests=${TESTS:-tests/ops}

# Not -DCMAKE_BUILD_TYPE=Release: the extension would be stripped of the names in a report.
"$bin/cmake" -S . -B "$build" -G Ninja -DCMAKE_CXX_COMPILER="${CXX:-g++}" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DKDFAST_CUDA=OFF -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-g1 -DNDEBUG" \
  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
  -DPython_EXECUTABLE="$(realpath -s "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
"$bin/cmake" --build "$build"

# The interpreter is not instrumented, so the sanitizer is loaded before it, with the C++ library whose functions it
# intercepts. Python itself leaks, and tests ask for more memory than there is.
report=$PWD/$build/report # pytest would swallow what a process prints before it is stopped
library() { "${CXX:-g++}" -print-file-name="$1"; }
sanitized() {
  LD_PRELOAD="$(library libasan.so) $(library libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$report \
    UBSAN_OPTIONS=print_stacktrace=1:log_path=$report OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY=PASSIVE \
    KDFAST_TEST_BACKENDS=native KDFAST_NATIVE_BUILD="$(echo "$PWD/$build"/_native*.so)" PYTHONPATH=.ci "$python" "$@"
}

# A read behind the end must be found.
rm -f "$report".*
sanitized -c "
import native_build, torch
from kdfast.ops.native import extension
x = torch.ones(16)
extension.scale_rows(x.data_ptr(), x.data_ptr(), 0, 2, 16, (x.data_ptr(), 0), 1.0, 1)" || true
grep -q heap-buffer-overflow "$report".* || { echo "the address sanitizer does not work"; exit 1; }
rm -f "$report".*

# shellcheck disable=SC2086
sanitized -m pytest -q -p native_build -p no:cacheprovider -m "not slow" \
  -k "not compile and not triton and not cuda and not memory" $tests || { cat "$report".* 2>/dev/null; exit 1; }
