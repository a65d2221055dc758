# What there is to do; CI calls the same targets. `make setup` runs by itself where it is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Several processes share few cores: one thread each.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo up test test-cluster test-contract test-slow openapi compatibility lint bench

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON) (Debian: apt-get install python3 python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "missing: Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "missing: venv (Debian: apt-get install python3-venv)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[trainer,service,dev]'
	@touch $@

demo: setup
	$(BIN)/syncbn demo $(DEMO_OPTIONS)

up: setup
	$(BIN)/syncbn up

# The tests that need neither a GPU nor minutes each.
test: setup
	$(BIN)/python -m pytest -m "not gpu and not cluster and not slow" --durations=20 $(TEST_OPTIONS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	@for script in $(filter-out benchmarks/house.py benchmarks/loaded_service.py, $(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# What takes minutes: several nodes of Ray, several services, and jobs that lose all of it and recover.
test-cluster: setup
	$(BIN)/python -m pytest -m cluster $(TEST_OPTIONS)

# Exhaustive versions of tests that `make test` runs in part: exact resume over many drawn specs.
test-slow: setup
	$(BIN)/python -m pytest -m slow $(TEST_OPTIONS)

# The API against its own document: all phases of schemathesis, and for longer than `make test` has.
test-contract: setup
	CONTRACT=long $(BIN)/python -m pytest tests/contract $(TEST_OPTIONS)

# Write docs/openapi.json anew.
openapi: setup
	UPDATE=openapi $(BIN)/python -m pytest -q tests/contract/test_document.py -k committed

# Refuse changes of docs/openapi.json that break clients made for that of the main line.
compatibility: setup
	$(BIN)/python -m tests.contract.compatibility
