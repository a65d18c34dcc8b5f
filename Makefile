# What one does in this project, by name. `make` lists it.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format docs bench shape certify

VENV ?= .venv
RUN := $(VENV)/bin/python -m
MODEL := models/SmolLM2-135M-Instruct
DATA ?= alpaca_en_demo.json

help:  ## List these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## Make the environment in .venv (VENV=DIR for another) and install the package with its test tools
	scripts/setup.sh test --collect-only -q >/dev/null

demo:  ## Fine-tune the built-in model and show its answers before and after
	scripts/setup.sh demo

test:  ## Run the fast tests
	scripts/setup.sh test

test-all:  ## Run all tests, as CI does
	.ci/run

lint:  ## Check style, types, spelling and layers
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/codespell
	$(VENV)/bin/lint-imports --no-logo

format:  ## Format the code
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

docs:  ## Run every command, row and setting of README and docs/
	$(RUN) pytest -m "" tests/project/test_readme.py

bench:  ## Compare time and memory with TRL on a CPU (DATA=FILE, by default alpaca_en_demo.json)
	$(VENV)/bin/python scripts/fetch_smollm2.py --output $(MODEL)
	$(VENV)/bin/python scripts/bench/vs_trl.py --data $(DATA)

shape:  ## Print figures of the code: sizes, densities, complexity, private attributes
	$(VENV)/bin/python scripts/shape.py

certify:  ## Run what takes hours: all equivalences, all families and architectures, hundreds of kills
	$(VENV)/bin/python scripts/verify_equivalence.py
	$(RUN) pytest -m "" tests/models tests/model/test_architectures.py
	$(VENV)/bin/python tests/cli/test_every_setting.py
	$(VENV)/bin/python scripts/crash_test.py --kills 200 --full_disks 20 --predict builtin:arithmetic
