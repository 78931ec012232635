# Two commands: `make demo` trains and probes on real images, `make test` runs the whole suite.
# Both create and reuse .venv; PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f \
	\( -name '*.py' -o -name '*.cpp' -o -name '*.h' \) 2>/dev/null)

.PHONY: demo test lint clean

demo: $(VENV)/.installed-demo
	$(BIN)/python -m directclr_fast demo --out runs/demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train,plot]'
	touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[test]'
	touch $@ $(VENV)/.installed-demo

clean:
	rm -rf build dist *.egg-info $(VENV)
