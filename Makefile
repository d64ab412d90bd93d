# make demo      the demo model reads a phantom, with the truth beside it; SCAN=path for a scan of yours
# make test      linters and the fast tests
# make test-all  the same and the slow part: clean environments, several processes, the library's own tests, fuzz
# Each sets up everything in .venv first; Python 3.11 or newer is all it needs.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Small models gain nothing from a second thread: a test process per core instead, at most four, of up to 2 GB each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
SCAN ?=
unexport PYTHONDONTWRITEBYTECODE  # or each of the many processes that the tests start compiles this package anew

.PHONY: demo test test-all lint clean

demo: .venv/.core
	$(BIN)/python examples/demo.py --scan "$(SCAN)" --out demo-output

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m "slow or not slow"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter --no-progress modeling_ct_moe/

.venv/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "python3 has no venv module (on Debian: apt install python3-venv)"; exit 1; }
	@touch $@

.venv/.core: .venv/.venv pyproject.toml constraints.txt
	@echo "Installing ct-moe for inference into .venv (once, a minute or two) ..."
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.venv pyproject.toml constraints.txt
	@echo "Installing ct-moe with its test tools into .venv (once, a minute or two) ..."
	$(PIP) -e ".[dev]"
	@touch $@ .venv/.core

clean:
	rm -rf .venv demo-output build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
