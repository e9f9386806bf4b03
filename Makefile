# The two commands are `make demo` and `make test`. Both build .venv first, from the versions in constraints.txt.
PYTHON ?= python3
# Test processes. Each computes on one thread, so this is also the number of busy cores.
WORKERS ?= 2
# Extra arguments for pytest: make test ARGS="tests/ops -k packed"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
# Stamps, touched when an installation has finished: an interrupted one is repeated, a finished one is not.
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help demo test check docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(RUNTIME)  ## Train a tiny model on Python's own source (five minutes at most) and let it write
	$(BIN)/transxssm demo

test: $(DEV)  ## Run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(DEV)  ## Lint, check the formatting, check the types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(DEV)  ## Build the documentation into site/
	$(PIP) --group docs
	$(BIN)/mkdocs build --strict

clean:  ## Remove what make, the tests and the tools have built; runs/ and results/ stay
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("transxssm needs Python 3.11 or newer, and $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: the pinned build decides, not what another package's range would accept.
$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes a few minutes."
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

# --group came with pip 25.1, and a new environment may hold an older one.
$(DEV): $(RUNTIME)
	$(PIP) pip
	$(PIP) --group dev
	@touch $@
