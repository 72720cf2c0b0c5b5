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

.PHONY: install serve test screenshots demo bench lint types format wheel clean

NATIVE := $(wildcard crdt_llm/inference/forward/native/*.[ch]pp)

# The page, as the relay serves it. Without npm there is none, and the relay serves a plain one.
PAGE := crdt_llm/web/index.html
# What it is made of: no test, and nothing that is made itself.
WEB_SOURCES := $(shell find web/page/src web/page/public web/provider/src -type f) \
  $(addprefix web/page/,index.html package.json precache.ts vite.config.ts weigh.mjs) \
  web/provider/package.json web/package-lock.json

install: $(VENV)/.installed $(CRDT_LLM_MODELS)/smollm2-135m/config.json $(PAGE)

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

ifneq ($(shell command -v npm),)
WEB_TOOLS := web/node_modules/.installed

web/node_modules/.installed: web/package.json web/page/package.json web/provider/package.json web/package-lock.json
	cd web && npm ci --no-audit --no-fund
	touch $@

$(PAGE): $(WEB_SOURCES) | web/node_modules/.installed
	cd web && npm run build --workspace page
else
$(PAGE):
	@echo "npm is missing: the relay will serve its plain page" >&2
endif

serve: install
	$(BIN)/crdt-llm serve

test: install tests/js/node_modules/.installed web/node_modules/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) --dist worksteal
	cd web && OMP_NUM_THREADS=1 npm test

# The pictures of the README, taken by the tests of the page.
screenshots: install
	cd web/page && OMP_NUM_THREADS=1 CRDT_LLM_SCREENSHOTS=../screenshots npx vitest run e2e/screenshots.test.ts

demo: install
	$(BIN)/python bench/demo.py

bench: install
	$(BIN)/python bench/chat.py --plots bench/plots
	$(BIN)/python bench/chat.py --short --without transformers --plots bench/plots
	$(BIN)/python bench/many.py
	$(BIN)/python bench/tree.py
	$(BIN)/python bench/disk.py --plots bench/plots
	$(BIN)/python bench/relay.py
	$(BIN)/python bench/checks.py

lint: $(VENV)/.installed $(WEB_TOOLS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(if $(WEB_TOOLS),cd web && npm run lint)

types: $(VENV)/.installed $(WEB_TOOLS)
	$(BIN)/mypy
	$(if $(WEB_TOOLS),cd web && npm run types)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

# What users get: the built wheel, with its base dependencies alone, in an environment of its own.
wheel: $(VENV)/.installed
	rm -rf dist $(VENV)/wheel-check
	$(BIN)/pip wheel --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)/wheel-check
	$(VENV)/wheel-check/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	$(VENV)/wheel-check/bin/crdt-llm chat --help >/dev/null
	$(VENV)/wheel-check/bin/python -c "from crdt_llm import Client"

clean:
	rm -rf $(VENV) dist tests/js/node_modules web/node_modules crdt_llm/web .mypy_cache .ruff_cache .pytest_cache .hypothesis
