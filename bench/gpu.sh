#!/usr/bin/env bash
# Run everything that needs a GPU, in at most 8 minutes and without network: build, tests marked cuda, benchmarks.
#
#     OUT=results bash bench/gpu.sh
#
# Requires kdfast's dependencies, scikit-build-core, pybind11, cmake, ninja, pytest, pytest-benchmark and hypothesis;
# PYTHON names the interpreter. Writes gpu.log, summary.json (exit code and seconds of each part) and one .json per
# benchmark to $OUT. A part that fails or times out does not stop the others and keeps its measurements so far. Exits
# with 1 if any part failed.
set -uo pipefail
: "${OUT:?set OUT to a folder for the results}"
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DEADLINE=${DEADLINE:-470} # seconds for all parts together
export KDFAST_RESULTS=$OUT PYTHONUNBUFFERED=1
# Compile for this machine's GPU only: code for four generations takes four times as long.
if nvidia-smi -L >/dev/null 2>&1; then export CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=native ${CMAKE_ARGS:-}"; fi

: >"$OUT/gpu.log"
parts=""
status=0

record() { # name, exit code, seconds
  parts+="${parts:+,}"$'\n'" {\"part\": \"$1\", \"exit\": $2, \"seconds\": $3}"
  printf '[%s\n]\n' "$parts" >"$OUT/summary.json"
  [ "$2" = 0 ] || status=1
}

part() { # name, time limit in seconds, command...
  local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) start=$SECONDS code
  shift 2
  if [ "$left" -lt 5 ]; then
    echo "== $name: no time left" | tee -a "$OUT/gpu.log"
    record "$name" 124 0
    return
  fi
  echo "== $name: $*" | tee -a "$OUT/gpu.log"
  timeout -k 5 "$((limit < left ? limit : left))" "$@" 2>&1 | tee -a "$OUT/gpu.log"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || echo "== $name exited with $code" | tee -a "$OUT/gpu.log"
  record "$name" "$code" "$((SECONDS - start))"
}

part build 150 "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps -e .
part doctor 30 "$PYTHON" -m kdfast doctor
# Warnings do not fail the tests: the installed versions may differ from those that the tests were written for.
part tests 140 "$PYTHON" -m pytest -q -m cuda -W default -p no:cacheprovider --continue-on-collection-errors tests
part kd_loss 150 "$PYTHON" bench/bench_kd_loss.py --device cuda
for bench in influence grad_norms; do
  part "$bench" 90 "$PYTHON" "bench/bench_$bench.py" --device cuda
done
exit "$status"
