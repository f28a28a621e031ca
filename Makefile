.DEFAULT_GOAL := help
PYTHON ?= python3
EXTRAS ?= dev
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help train test test-all compat check format bench wheel clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 18

# On Linux pip takes the CUDA build of torch; PIP_EXTRA_INDEX_URL with PyTorch's CPU index saves 3 GB.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=python3.12, for example."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

train: $(READY)  ## train a first GPT on Python's own source code, about 4 minutes on 2 cores
	$(BIN)/hf-nanogpt train

test: $(READY)  ## run the tests that matter for every change, about 4 minutes
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup -m "not slow"

test-all: $(READY)  ## run all tests, about 10 minutes; EXTRAS=dev,all for those of the extras
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

compat: $(READY)  ## load checkpoints in other releases of transformers: make compat RELEASES="oldest newest"
	$(BIN)/python tests/compat.py $(RELEASES)

check: $(READY)  ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## compare the speed of training steps here with transformers and plain torch
	$(BIN)/hf-nanogpt bench train

wheel: $(READY)  ## build the wheel, install it in an environment of its own and use it there
	rm -rf dist .wheel
	$(BIN)/python -m build
	$(PYTHON) -m venv .wheel
	.wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd .wheel && bin/python -c 'import hf_nanogpt; [getattr(hf_nanogpt, name) for name in hf_nanogpt.__all__]'
	cd .wheel && bin/hf-nanogpt doctor
	rm -rf .wheel

clean:  ## remove the environment and what was built, never runs/
	rm -rf .venv .compat .wheel dist build .mypy_cache .pytest_cache .ruff_cache
