# Two commands do everything on a machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARCHIVE ?= simulated
OUT ?= runs/demo
# Many tests wait: for servers, for Ray, for what is meant to time out. A file's tests stay together, as do their clusters.
TEST_PROCESSES ?= 3

.PHONY: setup demo test lint bench clean

setup: $(VENV)/.ready  ## create .venv with pinned versions

$(VENV)/.ready: pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip -c infra/constraints.txt
	$(BIN)/pip install --quiet -c infra/constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c infra/constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## archive -> dataset -> CROMA -> probes -> map, and a report to look at
	$(BIN)/python -m jobs.demo out=$(OUT) archive=$(ARCHIVE)

test: setup  ## all tests; what needs a server that is not there is skipped with its reason
	$(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## measure alternatives against each other
	$(BIN)/python -m tests.bench_feed
	$(BIN)/python -m tests.bench_feed_s3
	$(BIN)/python -m tests.bench_pairing
	$(BIN)/python -m tests.bench_planning 1000000 10000000 100000000
	$(BIN)/python -m tests.bench_engine reading 4
	$(BIN)/python -m tests.bench_engine waiting 8 8.0
	$(BIN)/python -m tests.bench_sealing
	$(BIN)/python -m tests.bench_order
	$(BIN)/python -m tests.bench_reading
	$(BIN)/python -m tests.bench_growth
	$(BIN)/python -m tests.bench_epochs
	$(BIN)/python -m tests.bench_handout
	$(BIN)/pip download --quiet --no-deps --dest build/wheels torchgeo==0.8.1 || echo "no torchgeo to compare CROMA with"
	TORCHGEO_WHEEL=build/wheels/torchgeo-0.8.1-py3-none-any.whl $(BIN)/python -m tests.bench_model
	$(BIN)/python -m tests.bench_model gpu

clean:  ## remove the environment and what runs left behind
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
