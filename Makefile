# The verbs of the project. Continuous integration calls them and repeats nothing of them.
# They need make and a Python of 3.11 or later, nothing else: each makes the environment it runs in.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# ARGS reaches the program behind the verb:  make test ARGS="-k tree -x"
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs format venv clean

help:  ## List the verbs
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/.runtime  ## Do the store's main job on a real file system, and prove the result
	$(BIN)/python -m cowstore_cli.demo $(ARGS)

test: $(VENV)/.dev  ## Run every test
	@sh tools/system-packages.sh
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(ARGS)

check: $(VENV)/.dev  ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/unit/test_architecture.py

bench: $(VENV)/.dev  ## Measure against the peers, as ratios
	@sh tools/system-packages.sh bench
	$(BIN)/python -m tests.bench $(ARGS)

docs: $(VENV)/.runtime  ## Write the generated part of docs/cli.md anew
	$(BIN)/python tools/cli_reference.py

format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

venv: $(VENV)/.dev  ## Make the development environment in .venv

clean:  ## Remove what the verbs made
	rm -rf $(VENV) .cache build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two stamps, so that the demonstration does not wait for tools that it has no use for.
$(VENV)/.runtime: pyproject.toml tools/make-venv.sh
	sh tools/make-venv.sh "$(PYTHON)" $(VENV) ".[vm]"
	@touch $@

$(VENV)/.dev: pyproject.toml tools/make-venv.sh
	sh tools/make-venv.sh "$(PYTHON)" $(VENV) ".[dev]"
	@touch $(VENV)/.runtime $@
