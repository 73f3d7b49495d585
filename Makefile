# `make demo` trains DALL·E 2 on this machine and shows its pictures; `make test` passes the tests. Both set up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
.DEFAULT_GOAL := demo
.PHONY: demo test test-slow test-all lint style types tests setup clean

demo: $(READY)
	@$(BIN)/unclip run

# tests/conftest.py says what shares a process and what comes first. Three keep two cores busy: tests of Slurm and kills wait.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Types are checked beside the tests, which leave some of the cores idle.
test: $(READY) style
	@$(MAKE) --no-print-directory -j2 types tests

tests: $(READY)
	@$(PYTEST) -m "not slow"

# Those that `make test` leaves out; TESTS="FILE ..." takes some of them.
test-slow: $(READY)
	@$(PYTEST) -m slow $(TESTS)

test-all: $(READY) lint
	@$(PYTEST)

lint: style types

style: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .

types: $(READY)
	@$(BIN)/pyright --warnings

setup: $(READY)

$(READY): pyproject.toml
	@./setup.sh "$(PYTHON)" "$(VENV)"
	@touch $(READY)

clean:
	rm -rf $(VENV)
