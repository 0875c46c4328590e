PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1

.PHONY: help setup demo test lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## an environment in .venv with everything that demo and test need (CPU)

$(VENV)/.ready: docker/requirements-cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "Python 3.11 or 3.12 is needed, this is %d.%d: make PYTHON=python3.11 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint docker/requirements-cpu.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement docker/requirements-cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: setup  ## the whole method on the tiny world, at most 10 minutes on two cores
	$(BIN)/pns run recipes/tiny-qwen2.yaml

# Two processes, each with whole files and a Ray of its own: half of the time is waiting for processes to start.
test: setup lint  ## format, lint, types and every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile

lint: setup  ## format, lint and types alone; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## write files in the project's format, mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment, builds and caches; results in runs/ stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis
