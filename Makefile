# make demo: set up, then run the full pipeline on scikit-learn's digits.  make test: set up, then run the tests.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# Pinned for development; the package itself supports any torch >= 2.8.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
CSOURCES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
EMULATION := $(wildcard $(addprefix tests/cuda_emulation/,*.cpp *.cu *.h */*.h))
SOURCES := pyproject.toml CMakeLists.txt $(CSOURCES)
XDIST ?= -n 2 --dist worksteal

.PHONY: demo test test-slow test-matrix sanitize docs lint format bench cuda-check hub-kernel gpu release setup clean

demo: setup
	$(BIN)/python bench/kd_table.py digits --out demo

# One thread per worker; otherwise torch's spinning threads compete with those of the other worker.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST) -m "not slow"

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST) -m slow

# Builds and tests the operators with other interpreters, torch versions and compilers; see the top of the script.
test-matrix:
	bash .ci/matrix.sh

# Runs the operators' tests on kernels built with the address and undefined-behavior sanitizers.
sanitize: setup
	PYTHON=$(BIN)/python bash .ci/sanitize.sh

# Warnings are errors: a broken link or docstring fails the build.
docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSOURCES) $(EMULATION)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSOURCES) $(EMULATION)

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

# Compiles the CUDA sources if nvcc is installed, without touching the installed package; needs no GPU.
cuda-check: setup
	@if command -v nvcc >/dev/null; then \
	  $(BIN)/cmake -S . -B build/cuda-check -G Ninja -DKDFAST_CUDA=ON -DCMAKE_BUILD_TYPE=Release \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) && \
	  $(BIN)/cmake --build build/cuda-check; \
	else echo "cuda-check: nvcc is not installed; nothing was compiled"; fi

# Writes a folder for the kernel hub of Hugging Face to $OUT: the losses in torch and Triton, without kdfast.
hub-kernel: setup
	$(BIN)/python .ci/hub_kernel.py $(or $(OUT),build/hub-kernel)

# On a machine with a GPU: builds, runs the tests that need it and the benchmarks, and writes the results to $OUT.
gpu: setup
	OUT=$${OUT:-gpu-results} PYTHON=$(BIN)/python bash bench/gpu.sh

# Writes the files of a release and their digests to dist: the source archive, a wheel for this machine, and $ASSETS.
release: setup
	rm -rf dist
	$(BIN)/python -m pip install -q build
	$(BIN)/python -m build -q --no-isolation
	$(if $(ASSETS),cp $(ASSETS) dist/)
	cd dist && sha256sum * | tee SHA256SUMS

setup: $(VENV)/.installed

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)"
	@touch $@

# FFCV builds from source against two system libraries; without them kdfast uses its resident loader.
$(VENV)/.ffcv: $(VENV)/.venv
	@pkg-config --exists opencv4 libturbojpeg 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi; \
	  command -v apt-get >/dev/null && $$as_root true 2>/dev/null && \
	  $$as_root apt-get update -qq && \
	  $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	    g++ libopencv-dev libturbojpeg0-dev pkg-config >/dev/null; } || true
	@if pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then \
	  $(BIN)/python -m pip install -q setuptools "ffcv==1.0.2" \
	    || echo "FFCV did not build (see above): kdfast will use its resident loader"; \
	else \
	  echo "FFCV needs libopencv-dev, libturbojpeg0-dev and pkg-config (apt-get install them, then make clean setup):" \
	    "without it kdfast uses its resident loader"; \
	fi
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.ffcv
	$(BIN)/python -m pip install -q "scikit-build-core>=0.11" "pybind11>=2.13" cmake ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

clean:
	rm -rf build docs/_build $(VENV)/.installed $(VENV)/.ffcv demo
