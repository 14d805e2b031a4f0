# Every target needs Python 3.11 or newer with pip, nothing else. The virtual environment is made when it is
# missing, and each extra is installed again only when pyproject.toml (or CONSTRAINTS) has changed.
#
#   make bench ARGS="--list"                      arguments for the command behind a target
#   make bench PEERS=1                            install the peers too (torch or tokamax: large), then compare
#   make test PYTHON=python3.12 VENV=.venv-3.12   another interpreter, another environment
#   make test CONSTRAINTS=constraints/floor.txt VENV=.venv-floor     the oldest supported versions

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?=
ARGS ?=
PEERS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-
DOCS := docs/_build/html

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help bench test lint format typecheck docs clean distclean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

bench: $(STAMP)bench $(if $(PEERS),$(STAMP)peers)  ## compare attention on this machine
	$(BIN)/attnjax bench $(ARGS)

test: $(STAMP)dev  ## run the tests and the examples in the docstrings
	$(BIN)/python -m pytest -n $(WORKERS) --doctest-modules tests attnjax $(ARGS)

lint: $(STAMP)dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)dev  ## repair style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP)dev  ## check the types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)docs  ## build the site; its pages are executed
	$(BIN)/sphinx-build -W --keep-going docs $(DOCS)

clean:  ## remove what was built, keep the environments
	rm -rf build dist docs/_build .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name '.?*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the environments as well
	rm -rf $(VENV) .venv-floor .venv-newest

# One stamp per extra, so that `make bench` never waits for documentation tools.
$(STAMP)%: pyproject.toml $(CONSTRAINTS) | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[$*]'
	@touch $@

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)
