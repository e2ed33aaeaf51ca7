#!/usr/bin/env bash
# Measure and test everything that needs a GPU, without network: the queue of bench/gpu/parts.py.
#
#     OUT=results bash bench/gpu.sh [MINUTES [PART]...]     # default: 9, every part
#
# Requires kdfast's dependencies, scikit-build-core or pybind11 and cmake, nvcc, pytest, pytest-benchmark and
# hypothesis. Runs the parts in order, each with its own time limit. Writes to $OUT results.jsonl, one row for each
# measurement as soon as it is made, and log.txt. Rows that the present sources gave, in $OUT or in the committed
# bench/results/gpu/results.jsonl, are not measured again: copy $OUT/results.jsonl there and commit it, and the next run
# goes on where this one ended. Exits with 1 if a part failed or found no time.
#
# PYTHON  interpreter; default: python3
# DEVICE  cuda (default), or cpu: every part in small
# DATA    folder that gpu.pack_data writes; default: .gpu_data
# WHEELS  folder with wheels of what kdfast is compared with: liger_kernel, opacus; default: $DATA/wheels
# WORK    folder for builds and caches; default: build/gpu-$DEVICE
# COMMIT  commit of a copy without .git
set -euo pipefail
: "${OUT:?set OUT to a folder for the results}"
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export OUT
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD/bench${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m gpu "$@"
