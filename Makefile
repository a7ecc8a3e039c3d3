# `make demo` trains the quickstart, `make test` runs the fast tests. Both first make .venv, once.
# PYTHON=... chooses the interpreter; the first of python3, python3.12, python3.13, python3.11 that is new enough is used otherwise.
# JOBS=8 tests in eight processes; as many as there are cores, from two to four, otherwise.

VENV := .venv
BIN := $(VENV)/bin
JOBS := $(shell cores=$$(getconf _NPROCESSORS_ONLN); [ $$cores -gt 4 ] && cores=4; [ $$cores -lt 2 ] && cores=2; echo $$cores)
export PYTHON

.PHONY: demo test test-all lint docs clean
.NOTPARALLEL:

demo: $(VENV)/.installed
	$(BIN)/jaxreason train --config configs/quickstart.py --workdir runs/quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.installed-test-all
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m ""

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

# What the documentation takes from the code: the table of methods and the figures.
docs: $(VENV)/.installed
	$(BIN)/python -c "import pathlib, jaxreason.objectives as o; pathlib.Path('docs/algorithms.md').write_text(o.table())"
	$(BIN)/python -c "import pathlib, jaxreason.rewards.table as t; p = pathlib.Path('docs/host_rules.md'); p.write_text(t.rewritten(p.read_text()))"
	$(BIN)/python docs/figures/coefficients.py
	$(BIN)/python docs/figures/engine.py

# Leaves runs/ alone.
clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@launch/bootstrap.sh $(VENV)

$(VENV)/.installed-test: pyproject.toml constraints.txt
	@launch/bootstrap.sh $(VENV) test

$(VENV)/.installed-test-all: pyproject.toml constraints.txt
	@launch/bootstrap.sh $(VENV) test-all
