# A target that runs something first installs what it needs into .venv, unless pyproject.toml and
# constraints.txt are older than that. EXTRAS=dev leaves MindSpore out, which is an 800 MB wheel.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
EXTRAS ?= dev,mindspore
comma := ,
READY := $(VENV)/.ready-$(subst $(comma),-,$(EXTRAS))
RANKS ?= 4
WORKERS ?= 2
PYTEST_ARGS ?=

.DEFAULT_GOAL := help

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

HAS_MINDSPORE := $(RUN) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("mindspore") is None)'
LEFT_OUT := skipped: MindSpore is not installed (EXTRAS=dev,mindspore installs it)
JUDGE := $(VENV)/bin/syncbn-conformance run --ranks $(RANKS)
TWIN := .toolchain/twin.so
TWINLESS := skipped: the twin of our kernels is not compiled (make kernels compiles it)

.PHONY: conformance
conformance: $(READY) ## judge our layers on RANKS (4) ranks, and compare with MindSpore's operator
	$(JUDGE) --target syncbn.torch --oracle none
	@$(HAS_MINDSPORE) || echo "$(LEFT_OUT)"
	@! $(HAS_MINDSPORE) || $(JUDGE) --target syncbn.mindspore

.PHONY: conformance-more
conformance-more: $(READY) ## profile full, the other backends, graph mode, and syncbn.torch with the oracle
	$(JUDGE) --target syncbn.torch --profile full --oracle none --out reports/out/syncbn.torch-full
	$(JUDGE) --target syncbn.torch --backend aten --oracle none --out reports/out/syncbn.torch-aten
	@test -f $(TWIN) || echo "$(TWINLESS)"
	@! test -f $(TWIN) || $(MAKE) --no-print-directory conformance-twin
	@$(HAS_MINDSPORE) || echo "$(LEFT_OUT)"
	@! $(HAS_MINDSPORE) || $(MAKE) --no-print-directory conformance-mindspore

.PHONY: conformance-twin
conformance-twin: $(READY)
	$(JUDGE) --target syncbn.torch --backend twin --oracle none --out reports/out/syncbn.torch-twin

.PHONY: conformance-mindspore
conformance-mindspore: $(READY)
	$(JUDGE) --target syncbn.torch --profile smoke --out reports/out/syncbn.torch-oracle
	$(JUDGE) --target syncbn.mindspore --mode graph --profile smoke --oracle none --ranks 2 \
	  --out reports/out/syncbn.mindspore-graph

# Each baseline has the name of the folder of its report.
.PHONY: gate
gate: $(READY) ## compare the reports of the last runs with reports/baselines
	@status=0; for baseline in reports/baselines/*.json; do \
	  report=reports/out/$$(basename $$baseline .json); \
	  if test -f $$report/report.json; \
	  then $(VENV)/bin/syncbn-conformance gate --baseline $$baseline $$report || status=1; \
	  else echo "skipped: there is no $$report/report.json"; fi; done; exit $$status

.PHONY: baselines
baselines: $(READY) ## write reports/baselines from the reports of the last runs
	@for baseline in reports/baselines/*.json; do \
	  report=reports/out/$$(basename $$baseline .json); \
	  if test -f $$report/report.json; \
	  then $(VENV)/bin/syncbn-conformance baseline $$report --out $$baseline || exit; \
	  else echo "skipped: there is no $$report/report.json"; fi; done

.PHONY: kernels
kernels: $(READY) ## prove our Triton kernels without a device (puts 2.5 GB of tools into .toolchain)
	$(RUN) -m audit kernels install
	$(RUN) -m audit kernels check

.PHONY: mutants
mutants: $(READY) ## judge the suite: it must find every planted fault
	$(RUN) -m audit mutants --framework torch --declared
	@$(HAS_MINDSPORE) || echo "$(LEFT_OUT)"
	@! $(HAS_MINDSPORE) || $(RUN) -m audit mutants --framework mindspore --declared --seeds 1

.PHONY: study
study: $(READY) ## calibrate the bound on sound and unsound layers, write docs/tolerances.md
	$(RUN) -m audit study

.PHONY: findings
findings: $(READY) ## judge MindSpore's own operator, write docs/mindspore-conformance.md
	for ranks in 4 1; do $(VENV)/bin/syncbn-conformance run --target mindspore.mint --ranks $$ranks \
	  --out reports/out/mindspore.mint-$$ranks || test $$? = 1; done
	$(VENV)/bin/syncbn-conformance report findings --out docs/mindspore-conformance.md \
	  reports/out/mindspore.mint-4 reports/out/mindspore.mint-1

.PHONY: versions
versions: $(READY) ## judge the layer on the oldest and newest torch (8 GB in .versions)
	$(RUN) -m audit versions

# Engines that start ranks, and two hosts on one machine, from Debian's packages. Tests that find
# none of them are skipped with the reason.
ENGINES := openmpi-bin slurmctld slurmd slurm-client munge iproute2 nftables

.PHONY: engines
engines: ## install what the tests of the launchers mpirun and slurm need, if root and apt-get are there
	@if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then echo "left out: $(ENGINES): needs root and apt-get"; \
	elif which mpirun slurmctld munged ip nft >/dev/null; then :; \
	else apt-get update -qq && apt-get install -qq -y --no-install-recommends $(ENGINES) \
	  || echo "left out: $(ENGINES): apt-get could not install them"; fi

# In the order of their names, files of a few slow tests, such as those of the launchers, do not come
# last, where one process would run them while the other has nothing to do.
.PHONY: test
test: $(READY) ## the tests of everything, in WORKERS (2) processes (PYTEST_ARGS=... for pytest)
	@$(HAS_MINDSPORE) || echo "$(LEFT_OUT)"
	@test -f $(TWIN) || echo "$(TWINLESS)"
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

.PHONY: wheel
wheel: $(READY) ## build the wheel into dist/
	rm -rf build dist
	$(RUN) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

.PHONY: bench
bench: $(READY) ## count and time the layer against torch.nn.BatchNorm2d on CPU
	$(RUN) -m benchmarks.step
	$(RUN) -m benchmarks.layer

.PHONY: bench-check
bench-check: $(READY) ## compare the ratios of the last `make bench` with the kept ones
	$(RUN) -m benchmarks.check

.PHONY: lint
lint: $(READY) ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

.PHONY: clean
clean: ## remove .venv, .toolchain, caches, build output and reports
	rm -rf $(VENV) .versions .toolchain build dist *.egg-info reports/out benchmarks/out
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else \
	  f"Python 3.10 to 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(READY)
