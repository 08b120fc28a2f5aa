# Two commands matter to a newcomer: `make quickstart` and `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: quickstart test test-slow bench-flow bench-search bench-training paper compare bench-smoke examples clean

# One thread: a network as small as this one gains nothing from more, and on a busy machine loses much.
quickstart: .venv/plot.stamp
	OMP_NUM_THREADS=1 $(BIN)/python examples/quickstart.py

test: .venv/tests.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-slow: .venv/tests.stamp
	$(BIN)/python -m pytest -q -m slow

bench-flow: .venv/bench.stamp
	$(BIN)/python benchmarks/bench_flow.py --json --markdown --plot

bench-search: .venv/bench.stamp
	$(BIN)/python benchmarks/bench_search.py --large --queries 50000 --all-peers

bench-training: .venv/bench.stamp
	$(BIN)/python benchmarks/bench_training.py

# make paper DATASET=digits LOSS=proxy ARGS="--seeds 0"
DATASET ?= digits
LOSS ?= proxy
paper: .venv/bench.stamp
	$(BIN)/python benchmarks/paper.py --dataset $(DATASET) --loss $(LOSS) $(ARGS)

# make compare DATASET=letters ARGS="--vary sparsity=1,2"
compare: .venv/bench.stamp
	$(BIN)/python benchmarks/compare.py --dataset $(DATASET) $(ARGS)

# Each benchmark once at its smallest size: shows that it runs, says nothing about speed.
bench-smoke: .venv/bench.stamp
	for script in benchmarks/bench_*.py benchmarks/compare.py benchmarks/paper.py; do $(BIN)/python $$script --smallest || exit 1; done

examples: .venv/plot.stamp
	for script in examples/plot_*.py; do MPLBACKEND=Agg $(BIN)/python $$script || exit 1; done

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%.stamp: setup.py constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info quickstart.png
