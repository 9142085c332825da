# Each target makes .venv/ first where it is missing or older than the pins; the second call is instant.
# PYTHON=python3.12 chooses the interpreter, TORCH_INDEX=URL the index for torch (see launch/venv.sh --help).
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
ARGS ?=
# processes that share out the tests; many of them wait for others more than they compute
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 3 ? n + 2 : 4)))
FAULT_SEED ?= $(shell od -An -N2 -tu2 /dev/urandom | tr -d ' ')
# ranks share the cores: one thread each
export OMP_NUM_THREADS ?= 1
# hundreds of processes of the tests import distkd: compiled once is enough
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo test faults check format

help:  ## show this
	@echo 'usage: make TARGET'
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

$(STAMP): pyproject.toml constraints.txt launch/venv.sh
	@launch/venv.sh

venv: $(STAMP)  ## make .venv/ with everything that is needed

demo: $(STAMP)  ## shards, teacher, students and report on the embedded data: 2 CPU ranks, minutes
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) launch/demo.sh

test: $(STAMP)  ## all tests; ARGS='-k bank -x' are passed to pytest, WORKERS=0 runs one after the other
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder $(ARGS)

faults: $(STAMP)  ## 50 kills and more at random moments, some 15 minutes; FAULT_SEED=N takes the same moments again
	FAULTS=full FAULT_SEED=$(FAULT_SEED) $(BIN)/python -m pytest tests/faults -s $(ARGS)

check: $(STAMP)  ## lint, format, types and layers
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright
	$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
