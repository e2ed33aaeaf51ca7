"""Each compiler builds the kernels for each instruction set, with the same bits."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
PROGRAM = r"""
#include <cstdio>
#include <cstring>

#include "common/dtype.h"

using namespace kdfast;

constexpr int64_t kSize = 1 << 16;

struct Body {
  template <int W>
  KDFAST_INLINE static void run(const float* x, const Float16* halves, float* out) {
    Sum<W> sum;
    for (int64_t i = 0; i < kSize; i += kLanes) {
      const Floats<W> a = load<W>(x + i), b = decode<W>(halves + i);
      const Floats<W> e = exp_nonpositive(max(a, splat<W>(-90.0f)));
      sum.add_product(e, b);
      stream(out + i, fma(e, b, a));
    }
    stream_fence();
    sum.flush();
    out[kSize] = static_cast<float>(sum.total);
  }
};

using Run = void (*)(const float*, const Float16*, float*);
template <class Isa>
Run make() {
  return &Isa::template run<Body, void, const float*, const Float16*, float*>;
}

alignas(64) float x[kSize], out[3][kSize + kLanes];
Float16 halves[kSize];

int main() {
  for (int64_t i = 0; i < kSize; ++i) x[i] = -static_cast<float>(i) / 700.0f;
  for (int64_t i = 0; i < kSize; ++i) halves[i].bits = static_cast<uint16_t>(i * 2654435761u >> 7) & 0x7bff;
  const Run runs[] = KDFAST_FOR_EACH_ISA(make);
  int differ = 0;
  for (int level = 0; level <= isa_level(); ++level) {
    runs[level](x, halves, out[level]);
    differ += std::memcmp(out[level], out[0], sizeof(float) * (kSize + 1)) != 0;
  }
  std::printf("%d %d\n", static_cast<int>(sizeof runs / sizeof *runs), differ);
}
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set only")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_a_compiler_builds_every_instruction_set(tmp_path, compiler):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    source, program = tmp_path / "sets.cpp", tmp_path / "sets"
    source.write_text(PROGRAM)
    flags = ["-std=gnu++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi"]
    command = [compiler, *flags, f"-I{CSRC}", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "ignored" not in built.stderr, "an attribute of a function"
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["3", "0"], "number of instruction sets, and of those with other bits than the first"
