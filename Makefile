# make reproduce [SUITE=published|pocket|FILE.toml] [DATA=DIR] [OUT=DIR] [ARGS="--only cosines"]
# make test
# make docs [OUT=DIR]
# make picture [REPORT=out/pocket/report.html] [OUT=docs/report.png]
# make matrix [JOBS=2]
# make search
# All do all the set-up they need in .venv, from python3, pip, make and git alone.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install test lint types docs picture matrix search reproduce clean

help:
	@echo "make test         install what is needed, then lint, type-check and run the tests"
	@echo "make docs         write the API reference, from index.html on, into out/docs (OUT=DIR)"
	@echo "make matrix       run the whole support matrix and write tests/matrix/README.md (resumes; JOBS=2)"
	@echo "make search       try all hostile arguments and files, and properties on new examples (15 minutes)"
	@echo "make reproduce    install what is needed, then regenerate tables, figures and report"
	@echo "                  SUITE=published DATA=DIR [OUT=DIR] [ARGS='--only cosines']"
	@echo "make clean        remove the virtual environment"

# A python3 without the venv module (Debian's) gets virtualenv from pip, kept inside the tree.
$(BIN)/python:
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  rm -rf $(VENV) && \
	  $(PYTHON) -m pip install --quiet --target .venv-bootstrap virtualenv && \
	  PYTHONPATH=.venv-bootstrap $(PYTHON) -m virtualenv --quiet $(VENV); }

$(STAMP): $(BIN)/python pyproject.toml constraints.txt
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

install: $(STAMP)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy

# One thread a worker: two workers of two threads each would fight over two cores.
test: install
	@$(MAKE) --no-print-directory -j2 lint types
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The README's picture: the first screen of a report, drawn by Chrome.
picture: install
	$(BIN)/python -m docs.picture "$(or $(REPORT),out/pocket/report.html)" "$(or $(OUT),docs/report.png)"

docs: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m docs.build "$(or $(OUT),out/docs)"
	@echo "$(or $(OUT),out/docs)/index.html"

matrix: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix --all -j $(or $(JOBS),2)

# What `make test` samples, whole; and properties on examples that it does not draw.
search: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bad_inputs
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.kill_sweep
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m search
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --hypothesis-profile=search \
	  $$(grep -l "@given" tests/test_*.py)

reproduce: install
	$(BIN)/em-interp reproduce $(if $(SUITE),--suite "$(SUITE)") $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)") $(ARGS)

clean:
	rm -rf $(VENV) .venv-bootstrap
