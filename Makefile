# Everything is made in build/ by tools/; these are only short names for it.

PYTHON ?= python3
VENV_PYTHON = build/venv/bin/python

.PHONY: setup demo test lint bench bench-ablations bench-quick bench-step bench-unnamed clean

setup:
	$(PYTHON) -m tools setup

demo:
	$(PYTHON) -m tools demo

test:
	$(PYTHON) -m tools test $(ARGS)

lint:
	$(PYTHON) -m tools lint

bench-step: setup
	$(VENV_PYTHON) -m benchmarks.step_cost

# Needs the emoji model, see benchmarks/emoji. Goes on where it stopped; all of it takes hours.
bench: setup
	$(VENV_PYTHON) -m benchmarks.erasure.run --steps 10
	$(VENV_PYTHON) -m benchmarks.erasure.report

# One setting at a time; goes on like the other.
bench-ablations: setup
	$(VENV_PYTHON) -m benchmarks.erasure.ablations --steps 10
	$(VENV_PYTHON) -m benchmarks.erasure.ablations --steps 10 --instant protection rank templates target captions subspace
	$(VENV_PYTHON) -m benchmarks.erasure.ablation_tables

# What nobody named, on both small models. Hours on two cores; goes on where it stopped.
bench-unnamed: setup
	$(VENV_PYTHON) -m benchmarks.unnamed.run --processes 2
	$(VENV_PYTHON) -m benchmarks.unnamed.report

bench-quick: setup
	$(VENV_PYTHON) -m benchmarks.erasure.run --quick --steps 10 --threads 2 --results build/erasure/quick.jsonl
	$(VENV_PYTHON) -m benchmarks.erasure.report --results build/erasure/quick.jsonl --folder build/erasure

clean:
	rm -rf build
