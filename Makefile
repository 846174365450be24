# Every target that runs something installs what it needs into .venv first, and only when
# pyproject.toml or constraints.txt changed since.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
RANKS ?= 4
PYTEST_ARGS ?=

.DEFAULT_GOAL := help

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: conformance
conformance: $(READY) ## judge syncbn.torch on RANKS (4) ranks, clause by clause
	$(RUN) -m conformance run --target syncbn.torch --ranks $(RANKS)

.PHONY: test
test: $(READY) ## the tests of everything (PYTEST_ARGS=... for pytest)
	$(RUN) -m pytest $(PYTEST_ARGS)

.PHONY: bench
bench: $(READY) ## time the layer against torch.nn.BatchNorm2d on 2 ranks
	$(RUN) -m benchmarks.layer

.PHONY: lint
lint: $(READY) ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

.PHONY: clean
clean: ## remove .venv, caches, build output and reports
	rm -rf $(VENV) build dist *.egg-info reports/out benchmarks/out
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else \
	  f"Python 3.10 to 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)
