# Every target needs Python 3.11 or newer with pip, nothing else; a C++ compiler makes attention on CPUs faster. The
# virtual environment is made when it is missing, and what is in it is installed again only when pyproject.toml (or
# CONSTRAINTS) or the C++ has changed.
#
#   make bench ARGS="--list"                      arguments for the command behind a target
#   make bench PEERS=1                            install the peers too (torch or tokamax: large), then compare
#   make fuzz MINUTES=10 SEED=3                   other random programs, for longer
#   make test PYTHON=python3.12 VENV=.venv-3.12   another interpreter, another environment
#   make test CONSTRAINTS=constraints/floor.txt VENV=.venv-floor     the oldest supported versions
#   make test-gpu PEERS=1 CASES='gpu-causal*'     on an NVIDIA GPU: the tests, and some of the cases beside all peers
#   make test-aot CONSTRAINTS=constraints/floor.txt AOT=.venv-aot-floor     the same, compiling for GPUs and TPUs

PYTHON ?= python3
VENV ?= .venv
AOT ?= .venv-aot
GPU ?= .venv-gpu
CASES ?= gpu-*
CONSTRAINTS ?=
ARGS ?=
PEERS ?=
WORKERS ?= 2
MINUTES ?= 1
SEED ?= 0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-
PIP = $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
NATIVE := attnjax/kernels/native
DOCS := docs/_build/html
CPP := $(wildcard $(NATIVE)/*.h $(NATIVE)/*.cc tests/native/*.h tests/native/*.cc)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help bench test test-full fuzz mutants test-aot test-gpu sanitize lint format typecheck docs clean distclean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

bench: $(STAMP)bench $(if $(PEERS),$(STAMP)peers)  ## compare attention on this machine
	$(BIN)/attnjax bench $(ARGS)

test: $(STAMP)dev  ## run the tests and the examples in the docstrings
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --doctest-modules tests attnjax $(ARGS)

test-full: override ARGS += --cases=all
test-full: test  ## run every case of every test

fuzz: $(STAMP)dev  ## run random programs and compare with a formula in NumPy
	cd tests && $(abspath $(BIN))/python -m fuzz --minutes $(MINUTES) --seed $(SEED) $(ARGS)

mutants: $(STAMP)dev  ## put small faults into the engine, one at a time, and see that a test fails; hours
	cd tests && $(abspath $(BIN))/python -m mutants $(ARGS)

test-aot: $(AOT)/.installed-aot  ## compile for GPUs and TPUs that are not here; 2 GB of wheels
	$(AOT)/bin/python -m pytest -n $(WORKERS) --dist loadgroup --cases=all tests/aot $(ARGS)

# Memory as it is needed, because the tests are several processes, and torch wants some too. What is measured counts even
# where a test fails.
test-gpu: export JAX_PLATFORMS = cuda,cpu
test-gpu: export XLA_PYTHON_CLIENT_PREALLOCATE = false
test-gpu: $(GPU)/.installed-gpu$(if $(PEERS),-peers)  ## run tests and benchmark on the NVIDIA GPU that is here
	status=0; \
	$(GPU)/bin/python -m pytest -n $(WORKERS) -m device --cases=all tests $(ARGS) || status=$$?; \
	$(GPU)/bin/attnjax bench --case '$(CASES)' --rounds 7 --json benchmarks/results && exit $$status

sanitize: $(STAMP)dev  ## run the C++ under sanitizers: addresses, undefined behaviour, threads
	set -e; for kinds in address,undefined thread; do \
	  build=build/sanitize-$$kinds; \
	  $(BIN)/cmake -S tests/native -B $$build -DSANITIZE=$$kinds -DPython_EXECUTABLE=$(abspath $(BIN))/python; \
	  MAKEFLAGS=--no-print-directory $(BIN)/cmake --build $$build --parallel $(WORKERS); \
	  $$build/frames $$build/native/libattnjax_cpu.so $(ARGS); \
	done

lint: $(STAMP)dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(STAMP)dev  ## repair style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

typecheck: $(STAMP)dev  ## check the types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)docs  ## build the site; its pages are executed
	$(BIN)/sphinx-build -W --keep-going $(ARGS) docs $(DOCS)

clean:  ## remove what was built, keep the environments
	rm -rf build dist docs/_build .pytest_cache .ruff_cache .hypothesis .benchmarks .venv*/.installed-*
	find $(NATIVE) -mindepth 1 -maxdepth 1 ! -name '*.cc' ! -name '*.h' ! -name CMakeLists.txt -exec rm -rf {} +
	find . -name '.?*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the environments as well
	rm -rf $(VENV) $(AOT) $(GPU) .venv-floor .venv-newest

# The package has a stamp of its own, so that the C++ is compiled once for all extras; and there is one stamp per extra,
# so that `make bench` never waits for documentation tools.
$(STAMP)%: $(STAMP)package
	$(PIP) 'attnjax[$*]'
	@touch $@

# XLA's compilers for GPUs and TPUs. With --no-deps, because the libraries that programs would run with are not needed;
# a CUDA toolkit, of which the assembler is, comes as wheels where there is none.
$(AOT)/.installed-aot: pyproject.toml $(CONSTRAINTS)
	$(MAKE) --no-print-directory VENV=$(AOT) $(AOT)/.installed-dev
	version=$$($(AOT)/bin/python -c 'import importlib.metadata as m; print(m.version("jax"))') && \
	  $(AOT)/bin/python -m pip install --quiet --no-deps \
	    jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-cudnn-cu13 libtpu
	command -v nvcc || $(AOT)/bin/python -m pip install --quiet 'nvidia-cuda-nvcc>=13,<14' 'nvidia-cuda-runtime>=13,<14'
	@touch $@

# JAX with CUDA's libraries as wheels, of the version of JAX that is there; the driver is the machine's. torch wants those
# libraries too: pip finds versions that are right for both, if it is asked for both at once.
$(GPU)/.installed-gpu $(GPU)/.installed-gpu-peers: pyproject.toml $(CONSTRAINTS)
	$(MAKE) --no-print-directory VENV=$(GPU) $(GPU)/.installed-dev
	version=$$($(GPU)/bin/python -c 'import importlib.metadata as m; print(m.version("jax"))') && \
	  $(GPU)/bin/python -m pip install --quiet "jax[cuda13]==$$version" $(if $(PEERS),'attnjax[peers]' torch)
	@touch $@

$(STAMP)package: pyproject.toml $(CONSTRAINTS) $(NATIVE)/CMakeLists.txt $(wildcard $(NATIVE)/*.cc $(NATIVE)/*.h) | $(VENV)/pyvenv.cfg
	$(PIP) --editable .
	@touch $@

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)
