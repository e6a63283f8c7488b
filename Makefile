# Each target works on a fresh clone with nothing but python3 (3.10 or later); the environment is kept in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint clean

train: .venv/runtime       ## train on the sample data, then print the next command
	$(BIN)/python train.py

test: .venv/dev            ## all tests
	$(BIN)/python -m pytest

lint: .venv/dev            ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .

clean:                     ## remove the environment, the sample data and caches; runs/ is kept
	rm -rf .venv sample_data .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
