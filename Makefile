# Each target starts from nothing but Python 3.11: it makes .venv and installs what it needs, once per change
# of pyproject.toml or constraints.txt. Which build of torch is installed is your package index's choice: on a
# machine without a GPU, name PyTorch's CPU index in PIP_EXTRA_INDEX_URL first (see README).

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

# tests/bench and the long runs are opt-in; `make test PYTEST_ARGS="-k queue"` narrows. One process more than
# cores, for a third of the time is waiting, and four at the most (each has its own PostgreSQL, S3 and Prefect servers).
# A file's tests stay together and share theirs, and the files that take longest come first (tests/conftest.py).
CORES := $(shell getconf _NPROCESSORS_ONLN)
PYTEST_ARGS ?=
PYTEST_PROCESSES ?= --numprocesses $(shell echo $$(($(CORES) < 4 ? $(CORES) + 1 : 4))) --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=
SOAK_S ?= 60

.DEFAULT_GOAL := help
.PHONY: help demo test test-long check docs bench soak constraints clean

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-run  ## Make the bundled campaign's pictures on this machine and say where they are
	$(BIN)/sdpipeline demo

test: check  ## Run the checks, then every test but the long ones and the benches
	$(BIN)/python -m pytest $(PYTEST_PROCESSES) -m "not long" $(PYTEST_ARGS)

test-long: $(VENV)/.installed-dev  ## Run the tests that take minutes, longer fuzzing and a short soak
	SDP_TEST_FUZZ_EXAMPLES=400 SDP_TEST_FUZZ_S=20 \
	  $(BIN)/python -m pytest $(PYTEST_PROCESSES) -m "long or fuzz" $(PYTEST_ARGS)
	mkdir -p build
	SDP_TEST_SOAK_S=40 SDP_TEST_SOAK_SEEDS=1 SDP_TEST_SOAK_TABLE=build/SOAK.md \
	  $(BIN)/python -m pytest tests/chaos/soak.py --timeout=0

check: $(VENV)/.installed-dev  ## Lint, formatting, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.installed-dev  ## Build the documentation into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed-dev  ## Measure this machine; prints ratios
	$(BIN)/python -m pytest tests/bench --capture=no --timeout=0 $(BENCH_ARGS)

soak: $(VENV)/.installed-dev  ## All faults together, ten times SOAK_S seconds (60); writes tests/chaos/SOAK.md
	SDP_TEST_SOAK_S=$(SOAK_S) $(BIN)/python -m pytest tests/chaos/soak.py --capture=no --timeout=0

# Resolved, not installed: no build of torch is downloaded. PIP_CONSTRAINT=file holds a library back.
constraints:  ## Write constraints.txt anew: the newest versions that pyproject.toml admits
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --dry-run --ignore-installed \
	  --report build/constraints/report.json '.[all,dev,kubernetes,quantize,upscalers]'
	{ sed -n '/^#/p' constraints.txt; $(PYTHON) -c "$$PINS" build/constraints/report.json; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

define PINS
import json, re, sys
found = [each["metadata"] for each in json.load(open(sys.argv[1]))["install"]]
pins = {re.sub("[-_.]+", "-", each["name"]).lower(): each["version"].split("+")[0] for each in found}
print(*(f"{name}=={pins[name]}" for name in sorted(pins.keys() - {"sdpipeline"})), sep="\n")
endef
export PINS

clean:  ## Remove .venv, builds and caches; pictures and databases stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# torch goes first and alone, so that its build is chosen once and nothing later replaces it.
$(VENV)/.installed-run: EXTRAS := engine
$(VENV)/.installed-dev: EXTRAS := all,dev,quantize
$(VENV)/.installed-run $(VENV)/.installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	touch $(VENV)/.installed-run $@  # the larger set holds the smaller
