"""Print counts as JSON, in a process of their own, whose Triton compiles for a GPU that is not there.

python -m triton_compile list            # kernels of kdfast, and those of the cases
python -m triton_compile quick|all 80|90  # rows of the quick or of all cases
"""

from __future__ import annotations

import json
import sys
import warnings

import triton

from triton_compile.cases import cases, launched_kernels
from triton_compile.rows import count_cases


def main(selection: str, arch: str = "") -> None:
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    chosen = [case for case in cases() if selection == "all" or case.quick]
    if selection == "list":
        print(json.dumps({"launched": sorted(launched_kernels()), "counted": sorted({x.kernel for x in chosen})}))
    else:
        print(json.dumps({"triton": triton.__version__, "rows": count_cases(chosen, int(arch))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
