# One command each, the same for people and CI. `make` alone lists them.
# Needs only python3 (>= 3.11), make and a package index; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.swan-ready
# Tests start dozens of processes: none should compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format types imports thorough docs release-check zoo benchmarks check clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY) ## create .venv and install the package with its development tools

# Done again only when pyproject.toml changes.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "swan-surgery needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,demo]"
	@touch $@

demo: $(READY) ## dense digits network -> gates -> training -> smaller network, in about 2 minutes
	$(BIN)/swan-surgery demo

# worksteal keeps most files on one worker, so that what a file builds once is built once.
test: $(READY) ## the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## mypy: the package strictly, names and signatures in the tests
	$(BIN)/mypy

imports: $(READY) ## data flows one way
	$(BIN)/lint-imports

thorough: $(READY) ## the laws over 2,000 random networks, 500 damaged files, the smoke run of quality.py
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n 2 -m "law or thorough"

docs: .venv/.swan-docs-ready ## the documentation in site/, strictly; NOTEBOOKS=false shows the notebooks without running them
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html"

.venv/.swan-docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $@

release-check: ## build wheel and sdist, and run README's commands from the wheel in an empty environment
	PYTHON=$(PYTHON) .ci/release-check

zoo: $(READY) ## all of torchvision, timm's families, transformers: gated share, error, times, Torch-Pruning
	$(BIN)/python benchmarks/zoo.py

benchmarks: $(READY) ## speed of conversion, of gated training, and of the cut networks
	for script in speed overhead latency; do $(BIN)/python benchmarks/$$script.py || exit 1; done

check: lint types imports test ## everything CI runs

clean: ## remove what the tools left behind (.venv stays)
	rm -rf .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist out site
