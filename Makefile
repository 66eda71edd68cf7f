# Everything is made in build/ by tools/; these are only short names for it.

PYTHON ?= python3
VENV_PYTHON = build/venv/bin/python

.PHONY: setup demo test lint bench-step clean

setup:
	$(PYTHON) -m tools setup

demo:
	$(PYTHON) -m tools demo

test:
	$(PYTHON) -m tools test $(ARGS)

lint: setup
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

bench-step: setup
	$(VENV_PYTHON) -m benchmarks.step_cost

clean:
	rm -rf build
