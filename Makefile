# Every target does its own set-up; Python (3.11 or newer, with venv), git and make are all it needs.
#
#   make demo          write a planned answer with the shipped checkpoint
#   make test          linters, types, floor plan and tests
#   make test-floor    the tests with the oldest transformers that is served
#   make test-integration   the tests with PEFT, TRL, lm-eval and what else people plug in
#   make bench         measure the strategies        make train   train the shipped checkpoint anew
#   make wheel         build dist/*.whl              make clean   remove what was built, environments included
#
# On Linux the default torch brings CUDA libraries (gigabytes). A smaller one, for the CPU alone:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# More arguments for a command: make bench ARGS="--help". Another Python: make test PYTHON=python3.12

PYTHON ?= python3
TORCH_INDEX ?=
TORCH := torch==2.13.0
ARGS ?=
BIN := .venv/bin
FLOOR := .venv-floor/bin
PLUGGED := .venv-integration/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
# The dependencies of torch come with the package, from the usual index and with pinned versions.
INSTALL_TORCH = $(INSTALL) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX))

.PHONY: demo test test-floor test-integration bench train card wheel clean

demo: .venv/.stamp-run
	$(BIN)/hf-hybrid demo $(ARGS)

bench: .venv/.stamp-run
	$(BIN)/hf-hybrid bench $(ARGS)

train: .venv/.stamp-run
	$(BIN)/hf-hybrid train $(ARGS)

# The card and the README's table, from what `make bench ARGS="--json model_cards/results/hybrid-pocket.json"` measured.
card: .venv/.stamp-run
	$(BIN)/hf-hybrid card hybrid-pocket --portable --about model_cards/hybrid-pocket/about.md --picture docs/frontier.png \
		--results model_cards/results/hybrid-pocket.json --out model_cards/hybrid-pocket/README.md --readme README.md

test: .venv/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q $(ARGS)

test-floor: .venv-floor/.stamp
	$(FLOOR)/python -m pytest -q $(ARGS)

# The folder is ignored by default; a path that is named is run.
test-integration: .venv-integration/.stamp
	$(PLUGGED)/python -m pytest -q -o addopts="--import-mode=importlib --strict-markers --strict-config" tests/integration $(ARGS)

wheel: .venv/.stamp-dev
	rm -rf build dist
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv .venv-floor .venv-integration build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than what it was installed from. Code changes need none: the package is installed editable.
.venv/.stamp-torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL_TORCH) -c constraints.txt $(TORCH)
	touch $@

.venv/.stamp-run: .venv/.stamp-torch pyproject.toml constraints.txt
	$(BIN)/python $(INSTALL) -c constraints.txt -e .
	touch $@

.venv/.stamp-dev: .venv/.stamp-torch pyproject.toml constraints.txt
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[dev,plots]'
	touch $@ .venv/.stamp-run

.venv-floor/.stamp: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	$(FLOOR)/python $(INSTALL_TORCH) -c constraints-floor.txt $(TORCH)
	$(FLOOR)/python $(INSTALL) -c constraints-floor.txt -e '.[plots]' pytest
	touch $@

.venv-integration/.stamp: pyproject.toml constraints.txt constraints-integration.txt
	$(PYTHON) -m venv .venv-integration
	$(PLUGGED)/python $(INSTALL_TORCH) -c constraints.txt $(TORCH)
	$(PLUGGED)/python $(INSTALL) -c constraints.txt -c constraints-integration.txt -e '.[integration]' pytest
	touch $@
