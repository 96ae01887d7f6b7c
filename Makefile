# make generate   set up .venv, then run the main job on the embedded model and the bundled prompts
# make test       set up .venv, then lint, types, import contracts and tests
# make test-all   the same with the tests marked slow

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
# A file's tests stay in one process: they share runs that take seconds to make.
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist loadfile

.PHONY: generate test test-all check clean

generate: $(VENV)/installed
	$(RUN) -m jobs.generate

test: $(VENV)/installed-tests check
	$(RUN) -m pytest -q $(SIDE_BY_SIDE)

test-all: $(VENV)/installed-tests check
	$(RUN) -m pytest -q $(SIDE_BY_SIDE) -m "not gpu"

check: $(VENV)/installed-tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(RUN)
	$(VENV)/bin/lint-imports

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; name one with make PYTHON=/path/to/python"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade "pip>=25.1"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-tests: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
