# `make` alone lists the targets. Everything lives in .venv; the first target asked for builds it.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help golden test bench bench-full bench-engines stream docs claims cuda-check lint wheel mintest peers new clean sameness sameness-quick

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

golden: .venv/.ok  ## regenerate every committed golden case and compare it byte by byte
	$(BIN)/refattn golden verify

test: .venv/.ok  ## the whole test suite, on the CPU
	$(BIN)/python -m pytest -n auto --dist loadfile

cuda-check: .venv/.ok  ## CUDA kernels in the simulator, and to machine code where the toolkit is installed
	$(BIN)/python -m pytest tests/cuda
	$(BIN)/python -m refattn.engines.cuda.gate $(ARCHITECTURES)

bench: .venv/.docs  ## 26 problems beside the peers that are installed; writes docs/bench.md; see bench/README.md
	PYTHONPATH=. $(BIN)/python -m bench

bench-full: .venv/.docs  ## every problem of the grid, for hours; goes on where it was cut off
	PYTHONPATH=. $(BIN)/python -m bench --full

bench-engines: .venv/.ok  ## a few problems with pytest-benchmark, to compare two states of the code
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-autosave --benchmark-sort=fullname \
		--benchmark-columns=min,median,iqr,rounds --benchmark-group-by=group

stream: .venv/.ok  ## a million tokens through the state of a streaming variant: time and memory
	$(BIN)/python bench/stream.py

docs: .venv/.docs  ## build docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

claims: .venv/.docs  ## check the papers' claims on the CPU, without training; writes docs/claims.md and its pictures
	PYTHONPATH=tools $(BIN)/python -m claims

lint: .venv/.lint  ## style, types, spelling, the import stair, and no file above 400 lines
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/lint-imports
	@git ls-files '*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > 400 {print $$2 ": " $$1 " lines, 400 is the ceiling"; bad = 1} END {exit bad}'

wheel: .venv/.ok  ## build the wheel, install it in a fresh environment, test it outside the tree
	PYTHON="$(PYTHON)" bash tools/wheel.sh

mintest: .venv/.ok  ## the test suite on the lower bounds of pyproject.toml
	rm -rf build/mintest && $(PYTHON) -m venv build/mintest
	$(BIN)/python tools/lower_bounds.py > build/mintest/lower.txt
	build/mintest/bin/python -m pip install --quiet --disable-pip-version-check -r build/mintest/lower.txt -e .
	build/mintest/bin/python -m pytest -n auto --dist loadfile

sameness: .venv/.ok build/sameness/.ok  ## every golden case under other BLAS kernels, threads, CPU features and NumPy
	$(BIN)/python tools/sameness.py --other build/sameness/bin/python

sameness-quick: .venv/.ok build/sameness/.ok  ## the same for 40 cases and three BLAS kernels, as CI runs it
	$(BIN)/python tools/sameness.py --other build/sameness/bin/python --sample 40 --kernels 3

peers: .venv/.peers  ## install the peer frameworks (large) and compare with them
	$(BIN)/python -m pytest tests/peers

new: .venv/.ok  ## make new VARIANT=name: a variant module and its test, from the templates
	$(BIN)/python tools/new_variant.py "$(VARIANT)"

clean:  ## remove everything that make has made
	rm -rf .venv build dist docs/_build docs/variants docs/_flags.md .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks
	find refattn tests bench docs tools -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ok: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "refattn needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e ".[golden,test]"
	@touch $@

# The oldest NumPy that pyproject.toml admits, everything else as tested.
build/sameness/.ok: .venv/.ok
	$(PYTHON) -m venv build/sameness
	grep -v '^numpy==' constraints.txt > build/sameness/constraints.txt
	build/sameness/bin/python -m pip install --quiet --disable-pip-version-check -c build/sameness/constraints.txt \
		"$$($(BIN)/python tools/lower_bounds.py numpy)" -e ".[golden]"
	@touch $@

.venv/.docs: .venv/.ok
	$(PIP) -c constraints.txt -e ".[docs]"
	@touch $@

.venv/.lint: .venv/.ok
	$(PIP) -c constraints.txt -e ".[lint]"
	@touch $@

.venv/.peers: .venv/.ok
	$(PIP) -c constraints.txt -e ".[peers]"
	@touch $@
