# `make` shows what there is. Everything runs in .venv, which `make env` builds from requirements/.

PYTHON ?= python3
# cpu or gpu: which of requirements/*.lock.txt the environment gets.
BACKEND ?= cpu
# More arguments for the command behind a target, such as: make test ARGS="-k stream".
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed-$(BACKEND)

.DEFAULT_GOAL := help
.PHONY: help check env demo test unit faults lint format types proto proto-check engine-args lock bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

check: ## what this machine lacks, and how to install it
	@$(PYTHON) tools/check_system.py $(BACKEND) && echo "nothing is missing"

env: $(STAMP) ## the environment in .venv (about 2 minutes; again: nothing to do)

$(STAMP): pyproject.toml tools/install.py tools/check_system.py $(wildcard requirements/*.txt)
	@$(PYTHON) tools/check_system.py $(BACKEND)
	@echo "making the environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python tools/install.py $(BACKEND) dev
	@touch $@

demo: env ## a cluster of one router, one prefill and one decode worker answers two prompts
	@$(BIN)/python -m cluster.cli.demo $(ARGS)

test: env ## all tests
	@$(BIN)/python -m pytest $(ARGS)

unit: env ## the tests that need no engine and no cluster: seconds
	@$(BIN)/python -m pytest tests/unit $(ARGS)

faults: env ## what dies underneath a request, by the thousand and in real processes
	@$(BIN)/python -m pytest tests/faults $(ARGS)

lint: env ## format, lint and the direction of imports
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/python tools/check_layers.py
	@$(BIN)/lint-imports --no-cache --no-logo $(ARGS)

format: env ## put the code into shape
	@$(BIN)/ruff check --fix --quiet --exit-zero .
	@$(BIN)/ruff format --quiet .

types: env ## mypy, strictly
	@$(BIN)/mypy $(ARGS)

proto: env ## generate baton/v1 from proto/
	@$(BIN)/python tools/generate_proto.py

proto-check: env ## fails if baton/v1 is not what proto/ says
	@$(BIN)/python tools/generate_proto.py --check

engine-args: env ## the names of the installed vLLM's engine arguments, for the configuration
	@$(BIN)/python tools/generate_engine_args.py

lock: ## resolve the newest fitting versions into requirements/ (needs uv)
	@$(PYTHON) tools/lock.py $$(command -v uv || { echo "install uv first: pip install uv" >&2; exit 1; }) $(ARGS)

bench: env ## measure; docs/measurements.md says what
	@$(BIN)/python -m bench $(ARGS)

clean: ## remove the environment and all caches of tools (not the unpacked model in ~/.cache/baton)
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
