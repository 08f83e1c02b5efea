# SPDX-License-Identifier: Apache-2.0
# Each target first sets up its own environment in $(VENV), and again only when the requirements change.
#   make demo       learn NumberLine from purely random play (about 8 minutes on 2 cores, after the installation)
#   make test       the fast tests             make test-slow  the tests that take minutes
#   make check      format, lint, types        make bench      the benchmarks behind docs/results.md (hours; resumable)
# Overridable: PYTHON=python3.12, VENV=/elsewhere, WORKERS=8 (test processes), THREADS=4 (of one run),
# PYTEST_ARGS="-k losses".

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
THREADS ?= 2
PYTEST_ARGS ?=

# Waiting threads sleep: spinning ones slow everything tenfold as soon as another process wants a core.
export OMP_WAIT_POLICY ?= passive

BIN := $(VENV)/bin
READY := $(VENV)/.ready
ALL_READY := $(VENV)/.all-ready
LAUNCH := $(BIN)/accelerate launch --config_file examples/accelerate_configs/single.yaml \
	--num_cpu_threads_per_process $(THREADS)

.PHONY: setup demo test test-slow check format bench clean
.DELETE_ON_ERROR:

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with the tested versions (torch and the Hugging Face libraries: a large download) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

# DeepSpeed, bitsandbytes, and the other domains' packages: a browser's driver, a text game engine that is compiled, an emulator.
$(ALL_READY): $(READY)
	@echo "Adding DeepSpeed, bitsandbytes and the packages of all environments (some are compiled: a few minutes) ..."
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev,envs,deepspeed,qlora]' -c constraints.txt
	@touch $@

demo: $(READY)
	$(LAUNCH) examples/train_gym_cards.py --config examples/configs/demo.yaml

test: $(ALL_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(ALL_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow --durations 10 $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(ALL_READY)
	$(BIN)/python examples/benchmarks/tabular.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/benchmarks/speed.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/benchmarks/rollout.py
	OMP_NUM_THREADS=1 $(BIN)/python examples/benchmarks/environments.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/benchmarks/asynchronous.py
	$(BIN)/python examples/benchmarks/replay.py
	$(BIN)/python examples/benchmarks/scaling.py
	$(BIN)/python examples/benchmarks/size.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/benchmarks/learning.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/benchmarks/domains.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/benchmarks/online.py

clean:
	rm -rf .venv build dist out runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
