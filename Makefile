# `make demo` and `make test` work from a fresh clone: each makes its own virtual environment in $(VENV) when it is missing.
#
#   make test PYTHON=python3.12          another interpreter (3.11 or newer)
#   make test PIP_FLAGS="..."            extra flags for pip, such as where to find a CPU build of torch
#   make test PYTEST_FLAGS="-k report"   extra flags for pytest

VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
PYTEST_FLAGS ?=
WORKERS ?= 2
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
# the first interpreter that is new enough; 3.11 leads because constraints.txt is tested on it
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c '$(RECENT)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: help demo test soak lint docs bench-mnist clean distclean

help:
	@echo "make demo         train a small network on handwritten digits, prune it, print the certificate"
	@echo "make test         ruff, mypy and the tests with coverage"
	@echo "make soak         crashes, exceptions, malformed files, certificates and load by the thousand: up to half an hour"
	@echo "make lint         ruff and mypy alone"
	@echo "make docs         the documentation site, in docs/_build/html"
	@echo "make bench-mnist  the papers' protocol on MNIST (BENCH_FLAGS=--quick for a minute's worth)"
	@echo "make clean        remove caches and build outputs; make distclean: the virtual environment too"

demo: $(VENV)/.installed-demo
	$(BIN)/nettrim demo $(DEMO_FLAGS)

# One BLAS thread a worker: the workers already fill the cores, and more threads than cores slow each other down.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term $(PYTEST_FLAGS)

# the long form of the tests of crashes, faults, files, certificates and load: up to half an hour
soak: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak $(SOAK_FLAGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench-mnist: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.mnist $(BENCH_FLAGS)

# .installed-NAME says that the extra NAME is installed as the files below ask; pip runs again when one of them changes.
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt | $(VENV)/.made
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[$*]"
	@touch $@

$(VENV)/.made:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(RECENT)' 2>/dev/null || { \
		echo "nettrim needs Python 3.11 or newer, and $(if $(PYTHON),'$(PYTHON)' is none,no python here is one);" \
			"say where one is: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf build dist docs/_build *.egg-info .coverage .coverage.* htmlcov .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
