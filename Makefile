# Each target sets up what it needs. `make demo` and `make test` are all a newcomer has to type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled modules are kept, whatever the shell says: a hundred processes that the tests start import them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint bench bench-gpu clean

demo: $(VENV)/.installed
	$(BIN)/slotlab demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/slotlab bench extract
	$(BIN)/slotlab bench stream --cache cache/dinov2.zarr
	$(BIN)/slotlab bench train --cache cache/dinov2.zarr --preset default
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.busy

bench-gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) cache/*.zarr runs demo
