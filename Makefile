# One environment for everything; `make demo` and `make test` need Python 3.10 or newer and make, nothing else.
PYTHON ?= python3
# Folders that are removed: on the command line alone, as in `make test VENV=...`, and not from variables that are exported
VENV = .venv
DEMO = demo
INTEGRATION = integration
# Processes that run tests, with a thread each; 0: one process with all threads
PROCESSES ?= 2
# How test-integration runs nnU-Net's commands: processes (estimated 2 hours), mixed (60) or forks (15)
HARNESS ?= mixed
# Users with a GPU get their normal torch; elsewhere a fixed release. Override it as in
#   make demo TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
# dev,kernels: with Triton, whose tests are skipped otherwise
EXTRAS ?= dev
BIN = $(VENV)/bin
PARALLEL = --numprocesses $(PROCESSES) --dist loadfile
TESTS = $(BIN)/pytest
NATIVE = $(wildcard nnunetv2_e2enet/engine/native/*)
INSTALLED = $(VENV)/.installed-$(EXTRAS)
COMPILED = $(VENV)/.compiled

.PHONY: help install register demo test coverage test-slow sanitize test-integration test-versions compatibility results lint docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | column -t -s:

$(INSTALLED): pyproject.toml setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -c 'import torch; print(f"torch=={torch.__version__}")' > $(VENV)/torch.txt # the rest must not replace it
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/torch.txt --editable '.[$(EXTRAS)]'
	touch $@ $(COMPILED)

# An installation has compiled the core. Nothing remains of an old one, if a new one cannot be compiled
$(COMPILED): $(INSTALLED) $(NATIVE)
	$(if $(filter $(INSTALLED),$?),,rm -f nnunetv2_e2enet/engine/_core* && $(BIN)/python -m pip install --quiet --no-deps --editable .)
	touch $@

install: $(INSTALLED)  ## environment with the package in editable mode

register: install  ## make the environment's nnU-Net find E2ENet
	$(BIN)/e2enet register

demo: register  ## phantom data through nnU-Net's commands, E2ENet beside stock nnU-Net (3 to 7 minutes)
	rm -rf $(DEMO)
	$(BIN)/e2enet demo --folder $(DEMO)

test: $(COMPILED)  ## the tests, without the slow ones
	$(TESTS) $(PARALLEL)

coverage: $(COMPILED)  ## the tests, without the slow ones, and the lines of Python that none of them runs
	$(TESTS) $(PARALLEL) --cov

test-slow: $(COMPILED)  ## the slow tests
	$(TESTS) -m slow

sanitize: install  ## the compiled core under the address and undefined behaviour sanitizers (also part of test-slow)
	$(TESTS) -m slow tests/test_sanitizers.py

test-integration: register $(COMPILED)  ## nnU-Net's whole workflow: label schemes, configurations, steps (an hour on two cores)
	rm -rf $(INTEGRATION)
	PYTHONPATH=tests $(BIN)/python -m integration --folder $(INTEGRATION) --harness $(HARNESS)

test-versions: install  ## new environments with other versions of Python and nnU-Net (slow; downloads them)
	mkdir -p test-results
	$(TESTS) -m slow tests/test_versions.py --junitxml test-results/versions.xml

compatibility: install  ## docs/compatibility.md, from the results of test-integration, of test-versions and of the tests it names
	PYTHONPATH=tests $(BIN)/python -m integration.compatibility --results $(INTEGRATION)/results.json \
		--versions $(wildcard test-results/versions*.xml)

results: install  ## tables and figures of docs/results.md, from the records in docs/results
	$(BIN)/python benchmarks/results.py

lint: install  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install  ## the documentation site in site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

clean:  ## everything that is built
	rm -rf $(VENV) $(DEMO) $(INTEGRATION) test-results site build dist *.egg-info
