# make train   a small model learns multi-step arithmetic: warm-up, then reinforcement learning (minutes on two cores)
# make test    the default test suite (CPU, offline); THREADS=2: with two threads for each of its two processes
# make test-newest, make test-oldest    the default suite with the newest, and the oldest, versions that pyproject.toml
#              admits, each in an environment of its own (gigabytes where pip finds no CPU build of torch)
# make lint    ruff and mypy
# make study   do blocks and promising tokens help? about eight hours on two cores; it goes on where it stopped
# make bench   the measurements of RESULTS.md
PYTHON ?= python3
SEED ?= 0
THREADS ?= 1
BIN := .venv/bin

.PHONY: train test test-slow test-newest test-oldest lint study bench

$(BIN)/.installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

train: $(BIN)/.installed
	$(BIN)/lightning-mpo fit -c configs/experiment/quickstart.yaml --seed_everything $(SEED)

test: $(BIN)/.installed
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n 2 --dist loadfile -rs

test-slow: $(BIN)/.installed
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m slow -n 2 --dist loadfile -rs --durations=15

# Private names first: a break names itself before the suite shows what came of it.
define suite
	$(1)/bin/python -m pip list 2>/dev/null | grep -iE '^(torch|lightning|transformers|peft|datasets|jsonargparse|omegaconf) '
	-OMP_NUM_THREADS=1 $(1)/bin/python -m pytest tests/project/test_private_names.py
	OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist loadfile
endef

test-newest:
	test -d .venv-newest || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e '.[dev]'
	$(call suite,.venv-newest)

test-oldest:  # without TRL, whose release wants newer packages than these
	test -d .venv-oldest || $(PYTHON) -m venv .venv-oldest
	$(PYTHON) .ci/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/constraints.txt -e . pytest pytest-xdist hypothesis
	$(call suite,.venv-oldest)

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

study: $(BIN)/.installed
	$(BIN)/python benchmarks/study.py benchmarks/studies/verdict.yaml --jobs 2

bench: $(BIN)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/trl.py
	$(BIN)/python benchmarks/profile_step.py
