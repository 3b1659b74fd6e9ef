# make demo    every stage on this machine's own Python sources: entropy model, patches, training, report
# make test    everything CI checks, in an environment of its own
# make check   the same in .venv as it stands (also: make lint, types, layers, tests)
# make slow    the tests that take minutes
# make wheels  wheels with prebuilt kernels for Linux, macOS and Windows, in dist/ (docs/processors.md)
# make docs    the documentation site, in site/: open site/index.html
# make faults  every test of the fault table, slow ones too; writes docs/faults.md
# make pythons the tests of bytelm.data on each Python of PYTHONS that is there; it says which are not
# make nightly all of test, slow and faults, no test twice, on other random examples each night: some hours
#
# The environment is .venv. `make demo` installs the core alone into it, everything else installs the rest beside it; each is
# done once, and again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
BIN := .venv/bin
CORE := .venv/.core
INSTALLED := .venv/.installed

# Hundreds of processes of the tests import torch: compiled anew in each that takes twice as long.
export PYTHONDONTWRITEBYTECODE :=

.NOTPARALLEL:
.PHONY: demo test check slow wheels docs faults nightly lint types layers tests setup pythons

demo: $(CORE)
	$(BIN)/bytelm demo

test: setup check

# The tests come last: their closing line is the last one printed.
check: lint types layers tests

slow: setup
	$(BIN)/pytest -m slow --timeout 3600

# Zig's clang compiles for all of them; nothing of bytelm needs it.
WHEEL_NEEDS := ziglang==0.17.1 wheel==0.48.0 setuptools

wheels:
	$(PYTHON) -m venv .venv-wheels
	.venv-wheels/bin/pip install -q $(WHEEL_NEEDS) -c constraints.txt
	.venv-wheels/bin/python tools/wheels.py --out dist

docs: setup
	$(BIN)/mkdocs build --strict

faults: setup
	$(BIN)/pytest -q -n 2 -m fault --timeout 3600 --fault-table=docs/faults.md

# One run of pytest has all tests, quick and slow, those of the fault table among them.
nightly: setup lint types layers
	$(BIN)/pytest -q -n 2 -m "slow or not slow" --timeout 3600 --hypothesis-profile=thorough --fault-table=docs/faults.md

lint:
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Without the variable Pyright asks PyPI at every run whether it is the newest.
types:
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

layers:
	$(BIN)/lint-imports --no-logo --no-cache

# Two workers, as each imports torch: more of them cost more than they bring on a small machine.
tests:
	$(BIN)/pytest -q -n 2

# bytelm.data needs no torch, which is what takes long to install: these environments hold what it does need.
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
DATA_NEEDS := numpy cyclopts jaxtyping rich safetensors beartype hypothesis packaging pytest pytest-timeout \
	datasets pyarrow zstandard pillow soundfile

pythons:
	@set -e; for python in $(PYTHONS); do \
	  if ! version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then \
	    echo "$$python: not on this machine"; continue; fi; \
	  echo "Python $$version:"; $$python -m venv .venv-$$version; \
	  .venv-$$version/bin/pip install -q $(DATA_NEEDS) -c constraints.txt; \
	  PYTHONPATH=src .venv-$$version/bin/python -m pytest -q -p no:cacheprovider tests/data tests/cli/test_data.py \
	    --ignore tests/data/test_bpe.py --ignore tests/data/test_modalities.py; \
	done

setup: $(INSTALLED)

# Not compiled: that takes longer than all the rest, and Python does it anyway with what is imported.
$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e . -c constraints.txt --no-compile
	touch $@

$(INSTALLED): $(CORE)
	$(BIN)/pip install -e ".[dev]" -c constraints.txt --no-compile
	touch $@
