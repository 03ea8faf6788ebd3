# make demo    virtual environment, installation, then the main job with its defaults
# make test    the same environment with the development tools, then lint, types and tests
# make lint    ruff and mypy alone          make format  rewrite files the way `make lint` wants them
# make clean   remove what the targets above made (runs/ is kept: it holds your trained optimizers)
#
# Variables: PYTHON (3.10 or newer, makes the environment), VENV (where), PIP_FLAGS, DEMO_FLAGS, TEST_FLAGS; for
# example `make test TEST_FLAGS="-k rules -x"`.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
DEMO_FLAGS ?=
TEST_FLAGS ?=

# Without byte code every process compiles torch's sources anew, which takes longer than all else that it does.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
# --no-compile: byte code is written for the modules that are imported, when they are; compiling all of them
# took half of the whole installation's time.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Editable, so that a changed source file needs no new installation; a changed pyproject.toml does. Everything that is
# installed later builds on the demo's environment.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[train]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev,integrations]'
	-$(INSTALL) -e '.[sagemaker]'  # needs a C compiler; without it one test is skipped
	@touch $(VENV)/.installed-demo $@

demo: $(VENV)/.installed-demo
	$(BIN)/python train_optimizer.py $(DEMO_FLAGS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check --quiet .
	$(BIN)/python -m mypy

format: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TEST_FLAGS)

clean:
	rm -rf $(VENV) .venv-ci build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
