# Every command of the project. Each installs what it needs first; none needs git.

PYTHON ?= $(shell command -v python3.11 || echo python3)
DATA ?= ../shared/data
TRAIN_OPTIONS ?= --shards 2 --workers 4 --density 0.01 --baseline
TEST_OPTIONS ?= -m "not slow"
TEST_JOBS ?= --numprocesses auto --maxprocesses 4 --dist loadgroup
RAY_STORM_OPTIONS ?=
STORM_OPTIONS ?= --kills 200 --other-kills 50 --steps 500

VENV := .venv
BIN := $(VENV)/bin
QUIET_PIP := -m pip --quiet --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.NOTPARALLEL: # two pips in one environment would spoil it
.PHONY: help train fashion test test-slow test-wheel fuzz storm ray-storm compose-proof papers papers-full check protos protos-check namespace-check format clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: $(VENV)/.with-examples ## train on two shards and four workers, beside a dense baseline
	$(BIN)/thresher launch $(TRAIN_OPTIONS) examples/digits.py

fashion: $(VENV)/.with-examples ## the same on Fashion-MNIST; DATA=folder names where fashion_mnist.npz is
	$(BIN)/thresher launch $(TRAIN_OPTIONS) examples/fashion_mnist.py --data $(DATA)

test: $(VENV)/.with-test ## run the tests
	$(BIN)/python -m pytest $(TEST_JOBS) $(TEST_OPTIONS)

test-slow: $(VENV)/.with-test ## run the long ones: a hundred million parameters, a hundred thousand rounds, a million hostile messages; hours
	$(BIN)/python -m pytest -m slow

fuzz: $(VENV)/.with-test ## feed a million damaged frames to the decoder; some minutes
	$(BIN)/python tests/protos/fuzz_frames.py --inputs 1000000 --seed 0

storm: $(VENV)/.with-examples ## kill shards and workers hundreds of times, in every mode; half an hour
	$(BIN)/python benchmarks/storm.py $(STORM_OPTIONS)

ray-storm: $(VENV)/.with-ray ## kill shards, workers, nodes and drivers on a small Ray cluster; 15 minutes, needs root
	$(BIN)/python benchmarks/ray_storm.py $(RAY_STORM_OPTIONS)

compose-proof: $(VENV)/.created ## bring docker-compose.yml up, kill a shard and a worker, compare the counters, ask every panel; needs root
	$(BIN)/python benchmarks/compose_proof.py

papers: $(VENV)/.with-papers ## repeat the figures of the two papers, short; 20 minutes; DATA=folder names where the data are
	$(BIN)/python -m benchmarks.papers --data $(DATA)

papers-full: $(VENV)/.with-papers ## the same at the length that docs/papers.md shows; hours; goes on where it was interrupted
	$(BIN)/python -m benchmarks.papers --full --data $(DATA)

# Away from the repository nothing but the wheel can answer `import thresher`. What only repeats arithmetic or starts
# many processes is left to `make test`: it would find the same code.
WHEEL_TESTS := tests/protos tests/server tests/worker tests/deploy tests/ddp tests/test_architecture.py \
    tests/test_packaging.py tests/integration/test_laws.py
test-wheel: $(VENV)-wheel/.created ## run the tests against the wheel, installed alone, away from the repository
	rm -rf .build/dist
	$(VENV)-wheel/bin/python $(QUIET_PIP) wheel --no-deps --wheel-dir .build/dist .
	$(VENV)-wheel/bin/python $(QUIET_PIP) uninstall --yes thresher
	$(VENV)-wheel/bin/python $(QUIET_PIP) install --constraint constraints.txt "$$(ls .build/dist/*.whl)[test]"
	@away=$$(mktemp -d) && trap 'rm -rf "$$away"' EXIT && cp -r tests pyproject.toml "$$away" && \
	cd "$$away" && "$(CURDIR)/$(VENV)-wheel/bin/python" -m pytest $(TEST_JOBS) $(TEST_OPTIONS) $(WHEEL_TESTS)

check: $(VENV)/.with-check namespace-check protos-check ## lint, format, types, architecture, stubs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

protos: $(VENV)-protos/.installed ## regenerate the stubs from protos/thresher/v1/*.proto
	$(call generate,protos)

# Generated beside, not over, the stubs in place: so a worktree that is merely dirty is not taken for drift.
protos-check: $(VENV)-protos/.installed ## fail where the stubs are not what the .proto files say
	@rm -rf .build/protos && mkdir -p .build/protos
	$(call generate,.build/protos)
	diff -ru --exclude='*.proto' --exclude=__init__.py --exclude=py.typed --exclude=__pycache__ \
	    protos/thresher/v1 .build/protos/thresher/v1

namespace-check: ## fail where a thresher/__init__.py would hide the other source roots
	@! ls */thresher/__init__.py 2>/dev/null

format: $(VENV)/.with-check ## format the code and mend what ruff can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove environments, builds and caches; keeps runs/
	rm -rf .build $(VENV) $(VENV)-wheel $(VENV)-protos
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# An environment is made once. What is in it follows pyproject.toml and constraints.txt, by a stamp for each set of
# extras, so that a training run installs neither test nor lint tools.
$(VENV)/.created $(VENV)-wheel/.created $(VENV)-protos/.created:
	@.ci/venv "$(PYTHON)" $(@D)
	@touch $@

$(VENV)/.with-examples: EXTRAS := examples
$(VENV)/.with-ray: EXTRAS := examples,ray
$(VENV)/.with-report: EXTRAS := examples,report
$(VENV)/.with-test: EXTRAS := examples,test
$(VENV)/.with-check: EXTRAS := examples,test,check
$(VENV)/.with-%: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python $(QUIET_PIP) install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

# Its ratings are read, its code never runs: what it depends on is not wanted.
$(VENV)/.with-papers: $(VENV)/.with-report
	$(BIN)/python $(QUIET_PIP) install --no-deps recbole==1.2.1
	@touch $@

$(VENV)-protos/.installed: $(VENV)-protos/.created protos/requirements.txt
	$(@D)/bin/python $(QUIET_PIP) install --requirement protos/requirements.txt
	@touch $@

define generate
PATH="$(CURDIR)/$(VENV)-protos/bin:$$PATH" $(VENV)-protos/bin/python -m grpc_tools.protoc --proto_path=protos \
    --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
    protos/thresher/v1/*.proto
endef
