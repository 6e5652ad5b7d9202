# Each target makes the environment it needs, in .venv, with the Python given: make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WITH := PATH="$(abspath $(BIN)):$$PATH"

.PHONY: env demo test fast full native slow coverage docs release clean

demo: $(VENV)/.demo  ## segment real MR slices on the CPU and leave a page in demo-output/
	$(BIN)/recallseg demo --output demo-output

env: $(VENV)/.dev  ## what all targets below need, and what they need of it

test: full

fast: $(VENV)/.dev  ## format, lint, types and unit tests: for every change
	$(WITH) scripts/check-fast

full: $(VENV)/.dev  ## the same and all other tests: what main must pass
	$(WITH) scripts/check-full

native: $(VENV)/.dev  ## native code: sanitizers, valgrind, an emulated aarch64, PyCUDA
	$(WITH) PYTHON="$(abspath $(BIN))/python" scripts/check-native

slow: $(VENV)/.dev  ## campaigns, for hours: every Python, wheels, faults, fuzzing
	$(WITH) scripts/check-slow

coverage: $(VENV)/.dev  ## which lines and branches the tests reach: coverage/index.html
	$(WITH) scripts/coverage

release: $(VENV)/.dev  ## files of a release, from what is committed
	$(WITH) scripts/release build

docs: $(VENV)/.dev  ## the pages of docs/ and the reference, as a site in build/site
	$(WITH) scripts/build-docs

$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis coverage .coverage
