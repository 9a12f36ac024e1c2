# Two commands: `make run` and `make test`.  Both make what they need, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CACHE := .cache

.PHONY: run test lint types layers unit news clean

run: $(VENV)/demo
	@$(BIN)/python -m gateway.demo

test: lint types layers unit

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test
	$(BIN)/mypy

layers: $(VENV)/test
	$(BIN)/lint-imports

unit: $(VENV)/test $(CACHE)/clients $(CACHE)/wheels
	bin/isolated $(BIN)/pytest
