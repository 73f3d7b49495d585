# `make demo` trains DALL·E 2 on this machine and shows its pictures; `make test` passes the tests. Both set up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
.DEFAULT_GOAL := demo
.PHONY: demo test test-all lint setup clean

demo: $(READY)
	@$(BIN)/unclip run

# Whole workflows and a Slurm cluster want the cores for themselves; the rest shares them.
UNIT := -n auto --maxprocesses 4 --dist loadfile --ignore tests/integration
test: $(READY) lint
	@$(BIN)/python -m pytest -m "not slow" $(UNIT)
	@$(BIN)/python -m pytest -m "not slow" tests/integration

test-all: $(READY) lint
	@$(BIN)/python -m pytest $(UNIT)
	@$(BIN)/python -m pytest tests/integration

lint: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/pyright --warnings

setup: $(READY)

$(READY): pyproject.toml
	@./setup.sh "$(PYTHON)" "$(VENV)"
	@touch $(READY)

clean:
	rm -rf $(VENV)
