# `make demo` and `make test` do all their set-up in .venv; PYTHON=python3.12 make ... chooses the interpreter,
# EXTRAS=test,dali,ffcv what is installed beside the package.
PYTHON ?= python3
EXTRAS ?= test
BIN := .venv/bin
STAMP := .venv/.installed-$(EXTRAS)

.PHONY: demo test lint gpu-check clean

demo: $(STAMP)
	$(BIN)/python -m fastsimclr demo

# A process for each core, of one thread: most kernels run in Triton's interpreter, which is Python. And one process
# more, as tests of several ranks mostly wait.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=15 --dist worksteal \
	  -n $$($(BIN)/python -c 'import os; print(min(8, 1 + os.cpu_count()))')

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installs nothing: it runs on a GPU machine with the Python and PyTorch that are there; OUT=DIR takes the reports.
OUT ?= runs/gpu-check
gpu-check:
	$(PYTHON) -m fastsimclr.bench.gpu_check --out $(OUT)

clean:
	rm -rf build dist *.egg-info loaders/_cut*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find fastsimclr loaders kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml setup.py loaders/cut.c loaders/jpeg.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "make: $(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@
