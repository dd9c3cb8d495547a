# Every target does its own set-up; Python (3.11 or newer, with venv), git and make are all it needs.
#
#   make demo          write a planned answer with the shipped checkpoint
#   make test          linters, types, floor plan and tests
#   make test-floor    the tests with the oldest transformers that is served
#   make test-newest   the wheel with the newest transformers on the index, and whatever else is newest there
#   make test-gpu      the theorems on a CUDA device, where there is one
#   make test-integration   the tests with PEFT, TRL, lm-eval and what else people plug in
#   make bench         measure the strategies        make train   train the shipped checkpoint anew
#   make speculative   measure drafting beside other packages (docs/speculative.md)
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
NEWEST := .venv-newest/bin
PLUGGED := .venv-integration/bin
WORKERS ?= 2
# Tests of one file stay together: they share what they make.
PYTEST := -m pytest -q -n $(WORKERS) --dist loadfile
INSTALL := -m pip install --quiet --disable-pip-version-check
# The dependencies of torch come with the package, from the usual index and with pinned versions.
INSTALL_TORCH = $(INSTALL) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX))

# With the newest host: what we rely on in it, the README, and that every strategy writes what it should.
ON_NEWEST := tests/contracts/test_host_seam.py tests/contracts/test_pages.py tests/models/test_seams.py \
	tests/models/test_cache.py \
	tests/equivalence/test_autoregressive.py::test_greedy_equals_the_host \
	tests/equivalence/test_speculative.py::test_every_model_class \
	tests/equivalence/test_block_diffusion.py::test_several_blocks_equal_uncached_blocks \
	tests/equivalence/test_planned.py::test_verified_spans_equal_each_part_written_alone
ACROSS := tests/hub/across_hosts.py

.PHONY: demo test test-floor test-newest test-gpu test-integration bench speculative train card settings release wheel clean

demo: .venv/.stamp-run
	$(BIN)/hf-hybrid demo $(ARGS)

bench: .venv/.stamp-run
	$(BIN)/hf-hybrid bench $(ARGS)

train: .venv/.stamp-run
	$(BIN)/python -m benchmarks.train $(ARGS)

speculative: .venv/.stamp-run
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[benchmarks]'
	$(BIN)/python -m benchmarks.speculative $(ARGS)

# The card, the README's table and the picture of the sweep, from what these two measured:
#   make bench ARGS="--passes --coherence --json model_cards/results/hybrid-pocket.json"
#   make bench ARGS="--sweep --json model_cards/results/hybrid-pocket-sweep.json"
card: .venv/.stamp-dev
	$(BIN)/hf-hybrid card hybrid-pocket --portable --about model_cards/hybrid-pocket/about.md \
		--draw model_cards/results/hybrid-pocket-sweep.json --picture docs/frontier.png \
		--results model_cards/results/hybrid-pocket.json --out model_cards/hybrid-pocket/README.md --readme README.md

# docs/settings.md, from hf_hybrid/config.py.
settings: .venv/.stamp-run
	$(BIN)/python .ci/settings_page.py

# The folder of this version, for the tests of all later ones: tests/releases/<version>/.
release: .venv/.stamp-dev
	$(BIN)/python -m tests.hub.release

test: .venv/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python $(PYTEST) $(ARGS)

test-floor: .venv-floor/.stamp
	$(FLOOR)/python $(PYTEST) $(ARGS)

# Made anew every time, without constraints: what a user gets today. Only torch is pinned, for its size. The tests run
# beside the wheel, where the checkout cannot be imported. Folders that one host exported are used by the other.
test-newest: wheel .venv-floor/.stamp
	rm -rf .venv-newest build/newest
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/python $(INSTALL_TORCH) $(TORCH)
	$(NEWEST)/python $(INSTALL) dist/*.whl pytest
	mkdir -p build/newest
	cp -r benchmarks tests docs examples model_cards recipes *.md *.txt pyproject.toml build/newest
	cd build/newest && ../../$(NEWEST)/python -W error::DeprecationWarning:hf_hybrid ../../.ci/wheel_is_whole.py ../..
	cd build/newest && ../../$(NEWEST)/python -m pytest -q $(ON_NEWEST)
	$(FLOOR)/python build/newest/$(ACROSS) $(FLOOR)/python $(NEWEST)/python build/newest/upwards
	$(FLOOR)/python build/newest/$(ACROSS) $(NEWEST)/python $(FLOOR)/python build/newest/downwards

test-gpu: .venv/.stamp-dev
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python -m pytest -q -m gpu -s $(ARGS); \
	else \
		echo "make test-gpu: torch finds no CUDA device here, so nothing was tested"; \
	fi

# The folder is ignored by default; a path that is named is run.
test-integration: .venv-integration/.stamp
	$(PLUGGED)/python -m pytest -q -o addopts="--import-mode=importlib --strict-markers --strict-config" tests/integration $(ARGS)

wheel: .venv/.stamp-dev
	rm -rf build dist
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv .venv-floor .venv-newest .venv-integration build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
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
	$(FLOOR)/python $(INSTALL) -c constraints-floor.txt -e '.[plots,benchmarks]' pytest pytest-xdist
	touch $@

.venv-integration/.stamp: pyproject.toml constraints.txt constraints-integration.txt
	$(PYTHON) -m venv .venv-integration
	$(PLUGGED)/python $(INSTALL_TORCH) -c constraints.txt $(TORCH)
	$(PLUGGED)/python $(INSTALL) -c constraints.txt -c constraints-integration.txt -e '.[integration]' pytest
	touch $@
