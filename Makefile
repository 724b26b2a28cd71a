# Two commands for newcomers: `make demo` and `make test`. Everything lives in .venv and below this folder.
PYTHON ?= python3
# E.g. https://download.pytorch.org/whl/cpu, to install torch without CUDA packages.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export DAGSTER_HOME := $(CURDIR)/dagster_home
export PYTHONUNBUFFERED := 1

.PHONY: demo test ui check bench rehearse slow clean
.DEFAULT_GOAL := help

help:  ## Say what there is.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## Interpret real latents of a real model, from raw text to scores.
	$(BIN)/autointerp run demo

test: $(READY)  ## Run the tests (offline but for packages; minutes).
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

slow: $(READY)  ## Run the long tests too, against real servers (compiled on the first use).
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,servers,ray]'
	$(BIN)/python -m pytest -m "slow and not gpu"

ui: $(READY)  ## Dagster's UI at http://127.0.0.1:3000; Ctrl-C stops it.
	exec env --default-signal=INT,TERM $(BIN)/dagster dev -w workspace.yaml -h 127.0.0.1 -p 3000

check: $(READY)  ## Format, lint, types, import contracts, definitions, wheel: what CI checks.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python scripts/write_data_docs.py --check
	$(BIN)/dagster definitions validate -w workspace.yaml
	$(BIN)/python scripts/check_wheel.py

bench: $(READY)  ## Run the benchmarks; one JSON line per bar.
	$(BIN)/python -m benchmarks

rehearse: $(READY)  ## Rehearse a large study, kills, full disks, S3 errors, two daemons (40 minutes); a JSON line per figure.
	$(BIN)/python -m rehearsals

clean:  ## Remove results, Dagster's records and the environment.
	rm -rf store $(VENV) dagster_home/history dagster_home/schedules dagster_home/storage dagster_home/logs
