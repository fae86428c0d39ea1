# Each target sets up what it needs. `make demo` and `make test` are all a newcomer has to type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench bench-gpu clean

demo: $(VENV)/.installed
	$(BIN)/slotlab demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

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
	$(BIN)/slotlab extract --backbone dinov2
	$(BIN)/slotlab bench extract
	$(BIN)/slotlab bench stream --cache cache/dinov2.zarr
	$(BIN)/slotlab bench train --cache cache/dinov2.zarr --preset dinosaur --set optim.precision=bfloat16 \
	  --batch-size 64 --batch-size 128 --batch-size 256 --batch-size 512 --batch-size 1024 --batch-size 2048
	for graphs in false true; do for preset in default log-2026; do \
	  $(BIN)/slotlab bench train --cache cache/dinov2.zarr --preset $$preset --set optim.compile=$$graphs \
	    --set optim.cuda_graphs=$$graphs --batch-size 8 --batch-size 64 --batch-size 256 || exit; done; done

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) cache/*.zarr runs demo
