# Needs python3.11 or later, a C++ compiler (gcc 12), cmake, make and git; everything else is fetched into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
BUILD_DEPENDENCIES := "scikit-build-core>=0.11" "nanobind>=2.8" ninja
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# What the installed package depends on: the native core's sources and the declarations, not the Python files, which an
# editable install reads in place.
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
PARITY := build/parity-venv
CLIENTS := build/clients-venv

export CMAKE_BUILD_PARALLEL_LEVEL ?= 2
.DEFAULT_GOAL := help
.PHONY: help install demo test trust-ci trust lint parity clients bench bench-peers sanitize clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(VENV)/.created:
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.created
	@echo "building the native core and installing pagemill into $(VENV) (about a minute the first time)"
	@$(PIP) install $(BUILD_DEPENDENCIES)
	@$(PIP) install --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.installed
	@echo "installing what tests and linters need"
	@scripts/extra.sh $(BIN)/python dev | xargs -d '\n' $(PIP) install
	@touch $@

install: $(VENV)/.installed ## set up .venv and build the native core

demo: $(VENV)/.installed ## a tour of under a minute on the default model
	@$(BIN)/pagemill demo

# Two processes with one kernel thread each suit a machine of two cores.
test: $(VENV)/.dev ## run the tests
	@$(BIN)/pagemill models pull smollm2-135m >/dev/null || echo "tests that need the default model are skipped"
	PAGEMILL_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q --durations=10 --ignore=tests/trust $(ARGS)

trust-ci: $(VENV)/.dev ## the tests that earn trust, at a size for every change
	PAGEMILL_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest tests/trust -n 2 --dist worksteal -q --durations=12 $(ARGS)

trust: $(VENV)/.dev ## the same at release size (hours; goes on where it was stopped); writes docs/scorecard.md
	$(BIN)/python scripts/trust.py $(ARGS)

lint: $(VENV)/.dev ## style and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(VENV)/.dev ## compare with transformers, in an environment of its own
	@scripts/parity.sh $(BIN)/python $(PARITY) $(ARGS)

clients: $(VENV)/.dev ## other projects' clients against a real server, in environments of their own
	@$(BIN)/pagemill models pull smollm2-135m >/dev/null || echo "the clients' tests are skipped without the default model"
	@scripts/clients.sh $(BIN)/python $(CLIENTS) $(ARGS)

bench: $(VENV)/.dev ## generation with and without the cache, on both models
	$(BIN)/pagemill bench kvcache --tokens 200 --runs 3 $(ARGS)
	$(BIN)/pagemill bench kvcache --model gpt2-medium --tokens 200 --runs 3 $(ARGS)

bench-peers: $(VENV)/.dev ## speed against other engines, each set up in an environment of its own (an hour the first time)
	$(BIN)/pagemill bench peers --peers all $(ARGS)

sanitize: $(VENV)/.dev ## the native contract suite under address and undefined-behaviour sanitizers
	@scripts/sanitize.sh $(BIN)/python $(ARGS)

clean: ## remove what was built, .venv included
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
