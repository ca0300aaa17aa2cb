# make serve | test | lint | clean. Nothing to install by hand: each target sets up .venv for itself.
# PYTHON=... chooses the interpreter (3.11 to 3.13).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= serve_config.yaml
CASES ?= 10000
SCHEMAS ?= 500
PYTEST ?= $(BIN)/python -m pytest

.PHONY: help serve test test-kernels test-engine test-serve test-gpu fuzz lint format clean

help:
	@echo "make serve   run the server on $(CONFIG) (CONFIG=... for another)"
	@echo "make test    run the test suite        make lint    ruff and basedpyright"
	@echo "make fuzz    10 000 random requests, and 500 random JSON schemas (URL=... for a server that runs)"
	@echo "make test-gpu   kernels compiled and the tests that need a GPU"
	@echo "make format  apply ruff's format       make clean   remove $(VENV)"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; install one or pass PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# A client that tests speak through. It wants a huggingface_hub below 1.0, and does not use it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps lorax-client==0.6.3
	@touch $@ $(VENV)/.serve

# A token file written by some other local Ray would turn authentication on for one side only: say which we want.
serve: export RAY_AUTH_MODE ?= disabled
# Serve's own cost of a streamed item is several times smaller over gRPC on one event loop.
serve: export RAY_SERVE_USE_GRPC_BY_DEFAULT ?= 1
serve: export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD ?= 0
serve: export RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP ?= 0
serve: $(VENV)/.serve
	$(BIN)/python -m deployments.check $(CONFIG)
	$(BIN)/python -m deployments.run $(CONFIG)

test: test-kernels test-engine test-serve

# Processes share the files of tests where nothing starts Ray.
SHARED := -n auto --dist loadfile
# The Triton kernels run in Triton's interpreter, which is chosen when triton is imported: a run of their own.
test-kernels: $(VENV)/.dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) tests/kernels $(SHARED) $(ARGS)

ALONE := tests/engine tests/adapter_store tests/examples
test-engine: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PYTEST) $(ALONE) $(SHARED) $(ARGS)

# The browser that the console's tests drive. Where it cannot be had they are skipped, and say why.
$(VENV)/.browser: benchmarks/console/package-lock.json | $(VENV)/.dev
	@$(BIN)/python -m benchmarks.console.browser && touch $@ || true

test-serve: $(VENV)/.dev $(VENV)/.browser
	RAY_AUTH_MODE=disabled $(PYTEST) tests --ignore=tests/kernels $(ALONE:%=--ignore=%) $(ARGS)

# What a machine with a GPU runs beside the suite: the same kernel tests compiled, and tests/gpu. Compiling takes the
# time, so many processes share it.
test-gpu: $(VENV)/.dev
	$(PYTEST) tests/gpu tests/kernels tests/engine/test_batch.py tests/adapter_store/test_slots.py -n auto $(ARGS)

# More of what tests/api asks of the demo model, or with URL=http://... of a server that runs.
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.api.fuzz --cases $(CASES) $(if $(URL),--url $(URL))
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.api.schemas --count $(SCHEMAS) $(if $(URL),--url $(URL))

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --warnings

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
