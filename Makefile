# make run        the main job: train a small teacher, then shrink a student out of it, on this machine
# make install    .venv alone, with everything in it, but no training
# make test       lint, types and every test that isn't marked slow (what CI runs)
# make test-all   the slow tests as well
# make lint       ruff and mypy alone
# make bench      every benchmark of docs/performance.md, on a GPU where there is one; an hour on two cores
#
# make run RANKS=2 DS_CONFIG=ds_configs/zero3.json ARGS="--pruning.events 24"

PYTHON    ?= python3
BIN       := .venv/bin
INSTALLED := .venv/.installed
DS_CONFIG ?= ds_configs/zero2.json
# Without RANKS, DeepSpeed starts one rank per GPU, or one on a machine without.
RANKS     ?=
ARGS      ?=

BENCHMARKS := step losses loader corpus prune schedule memory ranks cached codecs busy

.PHONY: run install test test-all lint bench clean

run: $(INSTALLED)
	$(BIN)/deepspeed --quiet $(if $(RANKS),--num_accelerators $(RANKS)) \
	  launchers/pretrain.py --ds_config $(DS_CONFIG) $(ARGS)

install: $(INSTALLED)

# Two at a time, but for tests of whole runs, which have several processes each.
test: lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile tests/unit tests/parity
	$(BIN)/python -m pytest -m "not slow" tests/distributed tests/faults tests/integration

test-all: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
