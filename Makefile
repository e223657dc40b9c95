# `make run` does everything on a fresh clone; `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
.DEFAULT_GOAL := help
.PHONY: help run test soak lint ui clean evaluate-full

# Only what stands on make's own command line is a choice: an environment variable `data` is not.
given = $(filter command,$(firstword $(origin $(1))))
chosen = $(foreach name,preset data folder until push,$(if $(call given,$(name)),$(name)='$($(name))')) $(if $(call given,overrides),$(overrides))

help: ## this list
	@echo "make TARGET [preset=tiny|laptop|paper] [data=world|photos|files] [folder=PATH] [overrides='stage2.steps=900 seed=1'] [until=STAGE] [push=true]"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, found: $$($(PYTHON) --version 2>&1); set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv .venv
	@echo "Installing the packages of requirements.lock into .venv; several gigabytes, minutes."
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock \
	  && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .; \
	else \
	  echo "The lock is for Linux x86-64; here the ranges of pyproject.toml are installed."; \
	  $(BIN)/python -m pip install --quiet --upgrade pip && $(BIN)/python -m pip install --quiet --group dev -e .; \
	fi
	@touch $@

run: $(READY) ## raw data to a registered model; again: only what changed
	@python -m flows.end_to_end $(chosen)

test: $(READY) ## all tests but the long ones
	@OMP_NUM_THREADS=1 python -m pytest -m "not soak" -n logical --maxprocesses 8 --dist loadfile

soak: $(READY) ## the long tests
	@python -m pytest -m soak --timeout 7200

lint: $(READY) ## style, formatting, types
	@ruff check . && ruff format --check . && mypy

evaluate-full: $(READY) ## scores on every sample instead of a part of each split, into build/evaluate-full
	@python -m lyrics evaluate-full

ui: $(READY) ## MLflow on http://127.0.0.1:5000 and Prefect on http://127.0.0.1:4200, until Ctrl-C
	@trap 'kill $$(jobs -p) 2>/dev/null' INT TERM EXIT; \
	export PREFECT_HOME=$(CURDIR)/.prefect PREFECT_SERVER_ANALYTICS_ENABLED=false MLFLOW_DISABLE_TELEMETRY=true; \
	mlflow ui --host 127.0.0.1 --port 5000 & prefect server start --host 127.0.0.1 --port 4200 & wait

clean: ## remove what `make run` makes again or restores; keeps .venv, DVC's cache and the registry
	@rm -rf build data models reports .pytest_cache .mypy_cache .ruff_cache
