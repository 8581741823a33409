# `make demo` and `make test` do all their set-up in .venv; PYTHON=python3.12 make ... chooses the interpreter,
# EXTRAS=test,dali,ffcv what is installed beside the package.
PYTHON ?= python3
EXTRAS ?= test
BIN := .venv/bin
STAMP := .venv/.installed-$(EXTRAS)
LOWEST := .venv-lowest/.installed
SOURCES := pyproject.toml setup.py loaders/cut.c loaders/jpeg.c

# A process for each core, of one thread: most kernels run in Triton's interpreter, which is Python. And one process
# more, as tests of several ranks mostly wait. PYTEST takes more options, such as PYTEST='-k resume'.
PYTEST ?=
PROCESSES = $$(python3 -c 'import os; print(min(8, 1 + os.cpu_count()))' 2>/dev/null || echo 3)
RUN = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q --dist loadgroup -n $(PROCESSES) $(PYTEST)

.PHONY: demo test test-slow test-full test-lowest lint gpu-check clean

demo: $(STAMP)
	$(BIN)/python -m fastsimclr demo

test: $(STAMP)
	$(call RUN,.venv) -m "not slow and not full"

# The slow tests, and the hypothesis tests again with ten times as many examples.
test-slow: $(STAMP)
	$(call RUN,.venv) -m "(slow or examples) and not full" --hypothesis-profile thorough

# The longest checks, before a release: kills by the hundred, folders of 100,000s of files, whole studies.
test-full: $(STAMP)
	$(call RUN,.venv) -m full

# The fast tests with the oldest supported versions, named in tests/lowest.txt.
test-lowest: $(LOWEST)
	$(call RUN,.venv-lowest) -m "not slow and not full" $(LOWEST_TESTS)
LOWEST_TESTS := tests/kernels tests/loaders tests/models tests/training tests/runs tests/cli tests/runtime

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installs nothing: it runs on a GPU machine with the Python and PyTorch that are there; OUT=DIR takes the reports.
# PART=kernels, speed or training is one call of under 8 minutes; IMAGES=PATH; CHECK takes more options.
OUT ?= runs/gpu-check
gpu-check:
	$(PYTHON) -m fastsimclr.bench.gpu_check --out $(OUT) $(addprefix --part ,$(PART)) $(addprefix --images ,$(IMAGES)) $(CHECK)

clean:
	rm -rf build dist *.egg-info loaders/_cut*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find fastsimclr loaders kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: python
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "make: $(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

INSTALL = -m pip install --quiet --disable-pip-version-check

$(STAMP): $(SOURCES) | python
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

$(LOWEST): $(SOURCES) tests/lowest.txt | python
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python $(INSTALL) -c tests/lowest.txt -e '.[test]'
	@touch $@
