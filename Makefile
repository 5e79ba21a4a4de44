# make train   a small model learns multi-step arithmetic: warm-up, then reinforcement learning (minutes on two cores)
# make test    the default test suite (CPU, offline)
# make lint    ruff and mypy
# make study   PPO, GRPO and MPO over seeds (hours); finished runs are kept, and it goes on where it stopped
# make bench   the measurements of RESULTS.md
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

.PHONY: train test test-slow lint study bench

$(BIN)/.installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

train: $(BIN)/.installed
	$(BIN)/lightning-mpo fit -c configs/experiment/quickstart.yaml --seed_everything $(SEED)

test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --durations=15

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

study: $(BIN)/.installed
	$(BIN)/python benchmarks/study.py benchmarks/studies/mpo.yaml --jobs 2

bench: $(BIN)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/trl.py
	$(BIN)/python benchmarks/profile_step.py
