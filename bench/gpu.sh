#!/usr/bin/env bash
# Everything that needs a GPU, in at most 8 minutes: build, the tests marked cuda, and the benches. Results go to $OUT.
#
#     OUT=results bash bench/gpu.sh        (kdfast's dependencies installed; PYTHON names the interpreter)
set -uo pipefail
: "${OUT:?set OUT to a folder for the results}"
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
PYTHON=${PYTHON:-python3}
status=0

step() {  # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  local code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || { echo "== $name ended with $code"; status=1; }
}

step build 120 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
step doctor 30 "$PYTHON" -m kdfast doctor
step tests 120 "$PYTHON" -m pytest -q -m cuda tests
step kd_loss 200 "$PYTHON" bench/bench_kd_loss.py --device cuda
cp bench/results/kd_loss*.json "$OUT"/ 2>/dev/null
exit "$status"
