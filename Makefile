# Each target sets up what it needs: a virtual environment in .venv, with the tested versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test test-lowest matrix lint docs audit package clean

demo: $(VENV)/.examples  ## measure, select, train, evaluate and save: no network, about three minutes on two cores
	$(BIN)/python examples/train.py

test: $(VENV)/.test  ## all tests but those that take minutes, which `.venv/bin/pytest -m slow` runs
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-lowest:  ## the same on the lowest supported version of every dependency, in an environment of its own
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

matrix: $(VENV)/.quality  ## all tests on every supported set of versions, see noxfile.py: hours, and a CUDA torch each
	$(BIN)/nox

lint: $(VENV)/.quality  ## style and types, and the pages, in which every link and reference must exist
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs

docs: $(VENV)/.docs  ## the pages of docs/, as a site in build/docs: open build/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

audit: $(VENV)/.test $(VENV)/.quality  ## what is installed: whether it fits together, its licences, its known faults (needs a network)
	$(BIN)/python -m pip check
	$(BIN)/pip-licenses --partial-match --fail-on="GPL;General Public License" --summary
	$(BIN)/python -m pip freeze --exclude-editable | sed "s/+cpu//" > $(VENV)/audit.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/audit.txt

package: $(VENV)/.quality  ## the wheel and the source distribution, in build/dist, and whether the index would show them
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist
	$(BIN)/twine check --strict build/dist/*

clean:
	rm -rf .venv .venv-lowest .nox build outputs

$(VENV)/.%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[$*]"
	touch $@
