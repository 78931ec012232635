# Two commands: `make demo` trains and probes on real images, `make test` runs the whole suite.
# Both create and reuse .venv; PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f \
	\( -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

.PHONY: demo test bench lint clean

demo: $(VENV)/.installed-demo
	$(BIN)/python -m directclr_fast demo --out runs/demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# Measures every committed CPU result again and fills the tables: about 40 minutes on 2 idle cores.
bench: $(VENV)/.installed-bench
	FORCE=1 PYTHON=$(BIN)/python bench/cpu_suite.sh

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

$(VENV)/.installed-bench: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[bench]'
	touch $@ $(VENV)/.installed-demo

clean:
	rm -rf build dist *.egg-info $(VENV)
