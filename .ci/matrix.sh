#!/usr/bin/env bash
# Build kdfast and run tests/ops for each available combination of interpreter, torch version and compiler.
#
#     bash .ci/matrix.sh
#     PYTHONS="python3.11" TORCHES="2.13.0" COMPILERS="gcc" bash .ci/matrix.sh
#
# PYTHONS    interpreters; default: Python 3.10 to 3.13 as found on PATH, by uv or by pyenv
# TORCHES    versions of torch, or "newest"; default: "2.8.0 newest"
# COMPILERS  gcc and clang; default: both
# PIP_ARGS   further arguments of pip install, such as an index with CPU builds of torch
# TESTS      tests to run; default: tests/ops
#
# Missing tools are reported and skipped. Each combination has its own virtual environment and log in build/matrix. The
# script exits with 1 if a combination fails, or if none could run.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
matrix=$root/build/matrix
TORCHES=${TORCHES:-2.8.0 newest}
COMPILERS=${COMPILERS:-gcc clang}
TESTS=${TESTS:-tests/ops}
read -ra pip_args <<<"${PIP_ARGS:-}"
mkdir -p "$matrix"
summary=()
passed=0 failed=0

skip() { # what, why
  echo "skipped: $1: $2"
  summary+=("skipped  $1: $2")
}

find_python() { # version such as 3.12
  local found
  # A pyenv shim is on PATH even for an inactive version, but fails when run.
  if "python$1" -c "" 2>/dev/null; then
    command -v "python$1"
  elif command -v uv >/dev/null && found=$(uv python find --no-python-downloads "$1" 2>/dev/null); then
    echo "$found"
  elif command -v pyenv >/dev/null; then
    found=$(pyenv versions --bare 2>/dev/null | grep -E "^$1(\.|$)" | tail -1)
    [ -n "$found" ] && echo "$(pyenv root)/versions/$found/bin/python"
  fi
}

build_and_test() { # interpreter, torch, C++ compiler, name
  local venv=$matrix/$4 torch=torch numpy=numpy
  [ "$2" = newest ] || torch="torch==$2"
  # The interpreter of Triton 3.4 fails with NumPy 2.4.
  [[ $2 != 2.8.* ]] || numpy="numpy<2.4"
  rm -rf "$venv"
  "$1" -m venv "$venv" || return 1
  "$venv/bin/pip" install -q --upgrade pip || return 1
  "$venv/bin/pip" install -q "${pip_args[@]}" "$torch" "$numpy" "scikit-build-core>=0.11" "pybind11>=2.13" cmake ninja \
    "pytest>=8" "pytest-benchmark>=5" "hypothesis>=6" "psutil>=6" || return 1
  CXX=$3 CMAKE_ARGS="-DKDFAST_CUDA=OFF" "$venv/bin/pip" install -q "${pip_args[@]}" --no-build-isolation \
    -C build-dir="$venv/cmake" "$root" || return 1
  # Outside the checkout, so that the installed package is tested.
  cd "$venv" && bin/python -c "
import kdfast, torch
from kdfast.ops import native
print(f'kdfast from {kdfast.__file__}, torch {torch.__version__}, {native.isa()}')" || return 1
  OMP_NUM_THREADS=1 bin/pytest -q -m "not slow" -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" \
    "$root/$TESTS"
}

if [ -n "${PYTHONS:-}" ]; then
  read -ra pythons <<<"$PYTHONS"
else
  pythons=()
  for version in 3.10 3.11 3.12 3.13; do
    python=$(find_python "$version")
    if [ -n "$python" ]; then
      pythons+=("$python")
    else
      skip "Python $version" "not on PATH, and unknown to uv and pyenv"
    fi
  done
fi

for compiler in $COMPILERS; do
  case $compiler in
    gcc) cxx=g++ ;;
    clang) cxx=clang++ ;;
    *) cxx=$compiler ;;
  esac
  if ! command -v "$cxx" >/dev/null; then
    skip "$compiler" "no $cxx on PATH"
    continue
  fi
  for python in "${pythons[@]}"; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || {
      skip "$python" "it does not run"
      continue
    }
    for torch in $TORCHES; do
      name=py$version-torch$torch-$compiler
      log=$matrix/$name.log
      echo "$name ..."
      if (build_and_test "$python" "$torch" "$cxx" "$name") >"$log" 2>&1; then
        passed=$((passed + 1))
        summary+=("passed   $name: $(tail -1 "$log")")
      else
        failed=$((failed + 1))
        summary+=("FAILED   $name: see ${log#"$root"/}")
      fi
      echo "  ${summary[-1]}"
    done
  done
done

printf '\n'
printf '%s\n' "${summary[@]}"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
