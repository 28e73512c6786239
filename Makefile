# One command each; `make help` lists them. Everything is installed into .venv by the commands that need it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process a core, each with one thread: tests divide better than the small matrices in them. Each process keeps to
# files in a row, then takes from the other's: what a file sets up is rarely set up twice.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo gpu test pytest test-integration test-all soak fuzz test-core test-extras test-wheel lint format bench docs clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# torch and torchvision must come from one resolution: a wheel of one that lies about breaks the other.
$(VENV)/%.stamp: pyproject.toml setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -e '.[$*]'
	mkdir -p build/types && ln -sfn ../.. build/types/mmkd
	touch $@

demo: $(VENV)/demo.stamp ## the whole path on real images: teachers, store, student, scores (CPU, four to ten minutes)
	$(BIN)/mmkd demo mmkd-demo

# mypy keeps one core busy beside the tests. CI takes TESTS="not slow": one process then imports the tests once.
test: $(VENV)/dev.stamp ## lint, types, the tests that take at most a few seconds each
	$(MAKE) --no-print-directory -j2 lint pytest

pytest: $(VENV)/dev.stamp
	$(PYTEST) -m "$(or $(TESTS),not slow and not integration)"

test-integration: TESTS := integration and not slow
test-integration: pytest ## tests of whole commands, clusters and training runs; continuous integration runs them too

test-all: $(VENV)/dev.stamp ## every test, the slow ones too
	$(PYTEST)

soak: $(VENV)/dev.stamp ## random kill -9 of every kind of process, bytes compared after each (SOAK="--kills 300 --hours 2")
	PYTHONPATH=tests $(BIN)/python -P -m soak $(SOAK)

fuzz: $(VENV)/dev.stamp ## 10,000 random or damaged corpora, configurations and stores: read, refused in one line, nothing lost (FUZZ=4000)
	MMKD_FUZZ_EXAMPLES=$(or $(FUZZ),400) $(PYTEST) --timeout=3600 tests/test_fuzz.py tests/test_corpora_counter.py

test-core: $(VENV)/dev.stamp ## the sdist with the core's dependencies alone, then with the oldest versions allowed
	scripts/test-core
	scripts/test-core --lowest

test-extras: $(VENV)/dev.stamp ## the wheel with each extra in an environment of its own, and tests of what it brings
	scripts/test-extras

test-wheel: $(VENV)/dev.stamp ## a test file of each stage against the built wheel, from outside the checkout
	scripts/test-wheel

lint: $(VENV)/dev.stamp ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p mmkd.base -p mmkd.benchmarks -p mmkd.cli -p mmkd.demo -p mmkd.distill -p mmkd.evaluate -p mmkd.extract -p mmkd.store

format: $(VENV)/dev.stamp ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Peers (other stores and tools) live in environments of their own, so that neither side holds the other's versions back.
# They see our packages behind their own: each list names what ours lack, all of it pinned. A bare path in a .pth file is no
# site folder: the editable install stays asleep.
build/%.stamp: benchmarks/%.txt $(VENV)/dev.stamp
	$(BIN)/python -m venv --clear build/$*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(build/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
	build/$*/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-deps -r $<
	touch $@

bench: $(VENV)/dev.stamp build/peers.stamp build/clip-retrieval.stamp ## measure, as ratios in one run, into docs/benchmarks.md (BENCH="--only store" or --full)
	$(BIN)/python -P benchmarks/run.py $(BENCH)

gpu: ## tests and figures of this machine's GPU, into docs/benchmarks.md; no network with WHEELS=FOLDER (docs/install.md)
	scripts/gpu $(WHEELS)

docs: $(VENV)/docs,extract,distill,evaluate.stamp ## what docs/ says of the code from the code, then the site into build/site
	$(BIN)/python -P docs/generate.py
	# Not --quiet: mkdocs counts no warning that it does not print, so --strict would let all of them pass.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove what the commands above made
	rm -rf build dist mmkd-demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
