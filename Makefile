# `make` lists the targets. They run in .venv, which `make env` builds from requirements/.

PYTHON ?= python3
# cpu or gpu: selects the requirements/*.lock.txt to install.
BACKEND ?= cpu
# More arguments for a target's command, such as: make test ARGS="-k stream".
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed-$(BACKEND)

.DEFAULT_GOAL := help
.PHONY: help check env demo test unit faults lint format types proto proto-check engine-args lock bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

check: ## list what this machine lacks, and how to install it
	@$(PYTHON) tools/check_system.py $(BACKEND) && echo "nothing is missing"

env: $(STAMP) ## build the environment in .venv (about 2 minutes; only if something changed)

$(STAMP): pyproject.toml tools/install.py tools/check_system.py $(wildcard requirements/*.txt)
	@$(PYTHON) tools/check_system.py $(BACKEND) --install
	@echo "building the environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python tools/install.py $(BACKEND) dev
	@touch $@

demo: env ## start one router, one prefill worker and one decode worker, and answer two prompts
	@$(BIN)/python -m cluster.cli.demo $(ARGS)

test: env ## run all tests
	@$(BIN)/python -m pytest $(ARGS)

unit: env ## run the tests that need no engine and no cluster (a minute)
	@$(BIN)/python -m pytest tests/unit $(ARGS)

faults: env ## inject faults: thousands of simulated ones, then some in real processes
	@$(BIN)/python -m pytest tests/faults $(ARGS)

lint: env ## check format, lint rules, layers and the direction of imports
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/python tools/check_layers.py
	@$(BIN)/lint-imports --no-cache --no-logo $(ARGS)

format: env ## format the code and fix what ruff can fix
	@$(BIN)/ruff check --fix --quiet --exit-zero .
	@$(BIN)/ruff format --quiet .

types: env ## check types with mypy
	@$(BIN)/mypy $(ARGS)

proto: env ## generate the stubs from proto/
	@$(BIN)/python tools/generate_proto.py

proto-check: env ## fail if the stubs do not match proto/
	@$(BIN)/python tools/generate_proto.py --check

engine-args: env ## generate core/config/engine_args.py from the installed vLLM
	@$(BIN)/python tools/generate_engine_args.py

lock: ## pin the versions in requirements/ (needs uv; ARGS=--upgrade takes the newest)
	@$(PYTHON) tools/lock.py $$(command -v uv || { echo "install uv first: pip install uv" >&2; exit 1; }) $(ARGS)

bench: env ## run the measurements of docs/measurements.md (about an hour)
	@$(BIN)/python -m bench $(ARGS)

clean: ## remove the environment and tool caches (keeps the unpacked model in ~/.cache/baton)
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
