# Everything a newcomer runs. Each target makes .venv when it is missing and installs what it needs.
#   make demo        the main job: trains on real text and plots what came of it (about four minutes)
#   make test        the quick tests         make test-slow   the others too
#   make docs        the documentation, into site/
#   make lint types  ruff and mypy           make format      lets ruff rewrite
#   make wheel       into dist/              make bench-cpu   speed of the CPU backend, into benchmarks/results
#   make library     the compiled library into src/, for working with PYTHONPATH=src
# PYTHON chooses the interpreter that .venv is made with; ARGS is handed to the command of a target.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL: # the stamps share one environment
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
CONSTRAINED := $(PIP) install -c constraints-dev.txt
ARGS ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

SOURCES := pyproject.toml CMakeLists.txt README.md $(shell find src -type f -not -name '*.pyc' -not -name '*.so')

.PHONY: help demo test test-slow docs docs-serve lint format types wheel library bench-cpu bench-gpu install clean distclean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# ---------------------------------------------------------------- environment

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: Python 3.10 or newer is needed; choose one with 'make PYTHON=/path/to/python3 ...'" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "== $(VENV): a virtual environment"
	@$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(@D) && touch $@

# torch first, at the version of the constraints, so that nothing installed later brings another one.
$(STAMPS)/torch: $(STAMPS)/venv
	@echo "== $(VENV): torch"
	@$(CONSTRAINED) torch
	@touch $@

$(STAMPS)/build: constraints-dev.txt $(STAMPS)/torch
	@echo "== $(VENV): build tools"
	@$(CONSTRAINED) scikit-build-core cmake ninja
	@touch $@

# The package is installed as its users get it, compiled library included; again after each change of src.
# Without build isolation the compiler's work is kept in build/ from one time to the next.
$(STAMPS)/package: $(STAMPS)/build $(SOURCES)
	@echo "== $(VENV): race_attention"
	@$(CONSTRAINED) numpy safetensors
	@$(PIP) install --no-build-isolation --no-deps --force-reinstall .
	@touch $@

extras = $(BIN)/python tools/extras.py

$(STAMPS)/experiments: pyproject.toml constraints-dev.txt tools/extras.py $(STAMPS)/torch
	@echo "== $(VENV): packages of the experiments"
	@$(extras) experiments | $(CONSTRAINED) -r /dev/stdin
	@touch $@

$(STAMPS)/dev: pyproject.toml constraints-dev.txt tools/extras.py $(STAMPS)/torch
	@echo "== $(VENV): development tools"
	@$(extras) dev experiments triton | $(CONSTRAINED) -r /dev/stdin
	@touch $@

$(STAMPS)/docs: pyproject.toml constraints-dev.txt tools/extras.py $(STAMPS)/torch
	@echo "== $(VENV): documentation tools"
	@$(extras) docs | $(CONSTRAINED) -r /dev/stdin
	@touch $@

install: $(STAMPS)/package $(STAMPS)/dev

# ---------------------------------------------------------------- jobs

demo: $(STAMPS)/package $(STAMPS)/experiments
	@$(BIN)/python -m experiments.demo $(ARGS)

# GPU kernels run in Triton's interpreter, which a process has for all of its kernels or for none; not where arguments name
# files. pytest's 5 is "no test is so called".
define interpreted
	$(if $(findstring tests/,$(ARGS)),,TRITON_INTERPRET=1 $(PYTEST) $(1) tests/test_triton*.py $(ARGS)$(if $(ARGS), || [ $$? = 5 ]))
endef

test: $(STAMPS)/package $(STAMPS)/dev
	$(call interpreted,-m "not slow")
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMPS)/package $(STAMPS)/dev
	$(call interpreted)
	$(PYTEST) $(ARGS)

docs: $(STAMPS)/package $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "The documentation is in site/index.html"

docs-serve: $(STAMPS)/package $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve $(ARGS)

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMPS)/dev $(STAMPS)/package
	$(BIN)/mypy

wheel: $(STAMPS)/dev
	@rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

library: $(STAMPS)/build
	$(BIN)/cmake -S . -B build/inplace -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build build/inplace
	$(BIN)/cmake --install build/inplace --prefix src

bench-cpu: $(STAMPS)/package $(STAMPS)/experiments
	$(BIN)/python -m benchmarks.cpu $(ARGS)

bench-gpu: $(STAMPS)/package $(STAMPS)/experiments
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMPS)/package

distclean: clean
	rm -rf $(VENV)
