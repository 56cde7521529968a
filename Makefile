# Set-up and the project's jobs. `make quickstart` and `make test` each work on a fresh machine with Python 3.11-3.13, a C++ compiler and make.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS := tests/benchmarks/results

.PHONY: setup quickstart check test-fast test soak bench bench-gpu mask-table clean

setup: $(STAMP)

# deepspeed ships as source only and its build imports torch: torch first, then without build isolation.
$(STAMP): pyproject.toml constraints.txt
	@command -v g++ >/dev/null || { echo "a C++ compiler is needed (Debian: apt-get install g++)"; exit 3; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U "pip>=24" -c constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel ninja hatchling editables
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[train,dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python -m kit.quickstart

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not launch" -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(STAMP)
	$(BIN)/python tests/soak.py --out $(RESULTS)/$$(date +%F)-soak.json

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/cli_latency.py --json $(RESULTS)/$$(date +%F)-cli-latency.json
	$(BIN)/python tests/benchmarks/merge.py --layers 4 --hidden 1024 --inter 2816 --heads 16 --kv 4 --vocab 32000 --shard-gb 0.1 --out $(RESULTS)/$$(date +%F)-merge-small.json
	$(BIN)/python tests/benchmarks/data_preparation.py --processes 2 --trl-processes 1 2 4 --json $(RESULTS)/$$(date +%F)-data-20k.json

# A part: make bench-gpu BENCH_GPU="--works full,documents --shapes 8b --budget 380"; called again, it goes on.
bench-gpu: $(STAMP)
	$(BIN)/python tests/benchmarks/gpu.py $(BENCH_GPU)

mask-table: $(STAMP)
	$(BIN)/python tests/mask_table.py --out $(RESULTS)/$$(date +%F)-mask-table.json

clean:
	rm -rf $(VENV) .kit-cache build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
