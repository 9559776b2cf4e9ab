# Each target sets up what it needs: a virtual environment in .venv, with the tested versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test lint test-lowest clean

demo: $(VENV)/.examples  ## measure, select, train, evaluate and save: no network, about three minutes on two cores
	$(BIN)/python examples/train.py

test: $(VENV)/.test  ## all tests
	$(BIN)/python -m pytest -n 2

test-lowest:  ## all tests on the lowest supported transformers and peft, in an environment of its own
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

lint: $(VENV)/.quality  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-lowest outputs

$(VENV)/.%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[$*]"
	touch $@
