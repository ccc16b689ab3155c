# `make train` runs the main job, `make test` the test suite, `make check` what to run before a commit.
# Each sets up everything in .venv first, on any machine with Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
FLAGS ?=
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
# bytecode is written once, not made by every process anew: images of containers switch that off
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train check test install native lint types bench soak format docs

train: install
	$(BIN)/python -m safer_fast.train --amp bf16 $(FLAGS)

# lint, types, and the tests of the parts: three minutes on two cores
check: lint types
	$(PYTEST) -m "not slow" --ignore tests/system --ignore tests/bench $(FLAGS)

# all tests, whole commands, kills and benchmarks too: twenty-two minutes on two cores
test: install
	$(PYTEST) $(FLAGS)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/CMakeLists.txt kernels/*/*.cpp kernels/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	.ci/pip-install $(BIN) torch torchvision "setuptools>=77" wheel cmake ninja
	.ci/pip-install $(BIN) --no-build-isolation --editable ".[dev]"
	.ci/pip-install $(BIN) --no-deps torchattacks
	touch $@

native: install
	$(BIN)/python setup.py --quiet build_ext --inplace

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m bench.table --check
	$(BIN)/clang-format --dry-run --Werror kernels/csrc/* kernels/*/*.cpp tests/support/fake_gpu/*

# mypy follows no package_dir map: it checks a tree of links in which kernels lies where it is imported
types: install
	rm -rf build/types && mkdir -p build/types
	cp -rs "$(CURDIR)/safer_fast" build/types/ && cp -rs "$(CURDIR)/kernels" build/types/safer_fast/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p safer_fast

bench: install
	$(BIN)/python -m bench.ops
	$(BIN)/python -m bench.step
	$(BIN)/python -m bench.attack

# the documentation as a site with navigation, search and the Python API, built and read without network
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo build/site/index.html

# runs that are killed and resumed, a few seconds each (FLAGS="--cycles 1000 --seed 7"), then every
# flag of every command with every hostile value
soak: install
	$(BIN)/python -m tests.system.soak $(FLAGS)
	$(BIN)/python -m tests.system.hostile

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i kernels/csrc/* kernels/*/*.cpp tests/support/fake_gpu/*
