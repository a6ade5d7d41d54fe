# `make demo` and `make test` need Python 3.11+ and make; they set up $(VENV) themselves, once.
#
# torch goes in first and under an exact version, so that pip takes a CPU build where it can see one. The build on
# PyPI for Linux brings several GB of CUDA libraries; for the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
PYTHON  ?= python3
TORCH   ?= torch==2.13.0
VENV    ?= .venv
WORKERS ?= 2

PY := $(VENV)/bin/python

.PHONY: help setup demo test lint types wheel-check clean FORCE

help:
	@echo "make demo         quantize a small trained model and print the report"
	@echo "make test         ruff, then the tests that need no GPU"
	@echo "make lint         ruff check and ruff format --check"
	@echo "make types        mypy on the installed tree"
	@echo "make wheel-check  build the wheel and check that it holds every module and asset"
	@echo "make setup        only the environment, in $(VENV)"
	@echo "make clean        remove what the targets built, except $(VENV)"
	@echo "variables: PYTHON=$(PYTHON)  TORCH='$(TORCH)'  VENV=$(VENV)  WORKERS=$(WORKERS)"

setup: $(VENV)/.installed

# Its recipe always runs and touches the file only when TORCH has changed.
$(VENV)/.torch: FORCE
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is older than 3.11; set PYTHON=python3.x")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@test "$$(cat $@ 2>/dev/null)" = '$(TORCH)' || \
		{ $(PY) -m pip install '$(TORCH)' && echo '$(TORCH)' > $@; }

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PY) -m pip install -e '.[dev]'
	@touch $@

demo: setup
	$(PY) examples/demo.py

# PYTHONSAFEPATH: our folder kernels/ must not be found as Hugging Face's package of that name.
test: lint
	PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -q -m "not gpu"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: wheel-check
	MYPYPATH=.ship PYTHONSAFEPATH=1 $(PY) -m mypy -p qfx

# A stale build/ would put deleted modules into the wheel.
wheel-check: setup
	rm -rf build dist .ship
	$(PY) -m pip wheel -q --no-deps -w dist .
	$(PY) .ci/check_wheel.py dist/qfx-*.whl
	$(PY) -m pip install -q --no-deps --target .ship dist/qfx-*.whl

clean:
	rm -rf build dist .ship *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
