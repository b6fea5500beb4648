# make demo   a few minutes: environment, a model trained from nothing, and what it writes
# make test   the test suite
# make check  what CI runs: lint, types, tests

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo env test slow check lint types clean

demo: .venv/.installed
	$(BIN)/thinker train --out runs/demo $(if $(wildcard runs/demo/training),--resume)

test: .venv/.installed-test
	$(BIN)/pytest

slow: .venv/.installed-test
	$(BIN)/pytest -m slow

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

.venv/.installed-test: .venv/.installed
	$(PIP) --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
