# Every target sets up what it needs; a second call takes seconds.
#
# Where pip would choose a CUDA build of torch and none is wanted, name the package index of the
# CPU builds (pytorch.org says which): make install TORCH_INDEX=<url>

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
PYTEST_WORKERS ?= auto

# The default model lives beside the environment, so that removing one folder removes everything.
export CRDT_LLM_MODELS ?= $(CURDIR)/$(VENV)/models
# A model that is on disk is never looked up elsewhere.
export HF_HUB_OFFLINE ?= 1

.PHONY: install serve test demo bench lint types format wheel clean

install: $(VENV)/.installed $(CRDT_LLM_MODELS)/smollm2-135m/config.json

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  --constraint constraints.txt --editable '.[inference,dev]'
	touch $@

$(CRDT_LLM_MODELS)/smollm2-135m/config.json: | $(VENV)/.installed
	$(BIN)/crdt-llm model fetch

tests/js/node_modules/.installed: tests/js/package.json tests/js/package-lock.json
	@command -v npm >/dev/null || { echo "npm is missing: install Node.js 20 or newer (the tests run real Yjs clients)" >&2; exit 1; }
	cd tests/js && npm ci --no-audit --no-fund
	touch $@

serve: install
	$(BIN)/crdt-llm serve

test: install tests/js/node_modules/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) --dist worksteal

demo: install
	$(BIN)/python bench/demo.py

bench: install
	$(BIN)/python bench/chat.py
	$(BIN)/python bench/relay.py

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What users get: the built wheel, with its base dependencies alone, in an environment of its own.
wheel: $(VENV)/.installed
	rm -rf dist $(VENV)/wheel-check
	$(BIN)/pip wheel --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)/wheel-check
	$(VENV)/wheel-check/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	$(VENV)/wheel-check/bin/crdt-llm chat --help >/dev/null
	$(VENV)/wheel-check/bin/python -c "from crdt_llm import Client"

clean:
	rm -rf $(VENV) dist tests/js/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
