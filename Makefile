# Everything a developer or CI runs. Each target installs what it needs into .local/, .venv/ and the user's cache folder.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

UV_VERSION := 0.13.9
UV := .local/uv/bin/uv
PYTHON := .venv/bin/python
CLUSTER := python3 hack/cluster
RUN := $(UV) run --frozen --no-sync
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help
help: ## Show this help.
	@awk 'BEGIN {FS = ":.*##"} /^[a-z-]+:.*##/ {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The environment is rebuilt when the lock file or a member's project file changes.
.venv/.synced: $(UV) pyproject.toml uv.lock api/pyproject.toml operator/pyproject.toml trainer/pyproject.toml
	$(UV) sync --frozen
	@touch $@

$(UV): Makefile
	python3 -m venv .local/uv
	.local/uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

.PHONY: sync
sync: .venv/.synced ## Install the Python environment from the lock file.

.PHONY: demo
demo: sync ## Run the main job on a local cluster: pictures in, fine-tuned model out.
	$(PYTHON) hack/demo.py

.PHONY: test
test: sync ## Run all tests: unit, control plane, and the node with both images.
	$(CLUSTER) prepare
	$(RUN) pytest -m "not faults" $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: sync ## Run the long tests of faults: random kills, a lost node.
	$(CLUSTER) prepare
	$(RUN) pytest -m faults $(PYTEST_ARGS)

.PHONY: unit
unit: sync ## Run the tests that need no cluster.
	$(RUN) pytest -m "not apiserver and not node and not faults" $(PYTEST_ARGS)

.PHONY: verify
verify: sync generate ## Check style, types, import rules and generated files.
	$(UV) lock --check --quiet
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy api operator trainer hack/data hack/*.py hack/cluster bench
	$(RUN) lint-imports
	@changed="$$(git status --porcelain -- $(GENERATED))"; if [ -n "$$changed" ]; then \
		echo "generated files differ from their sources; run 'make generate' and commit:"; echo "$$changed"; git --no-pager diff -- $(GENERATED); exit 1; fi

GENERATED := crds charts docs/reference

.PHONY: generate
generate: sync ## Write the CRD, the chart's CRD, schema and README, and the reference pages.
	$(RUN) python hack/generate.py

.PHONY: golden
golden: sync ## Rewrite the golden files; read the diff.
	UPDATE_GOLDEN=1 $(RUN) pytest -q -m "not apiserver and not node and not faults" tests/finetune_operator tests/chart

.PHONY: bench
bench: sync ## Measure the trainer and the operator; prints the tables of docs/benchmarks.md.
	$(CLUSTER) binaries
	$(RUN) python -m bench $(BENCH_ARGS)

.PHONY: bench-scale
bench-scale: sync ## Measure how far the operator goes, with kwok as all kubelets; BENCH_ARGS="--part burst --jobs 1000".
	$(CLUSTER) binaries
	$(CLUSTER) path kwok
	$(RUN) python -m bench.scale $(BENCH_ARGS)

BASE_IMAGE ?=

.PHONY: release-check
release-check: sync ## Check hashes, licences and risky code; write a bill of materials for each image into dist/.
	$(UV) lock --check --quiet
	$(PYTHON) hack/release_check.py --uv $(UV) --base-image "$(BASE_IMAGE)"

.PHONY: cluster-up
cluster-up: ## Start the local cluster with its node; prints the kubeconfig's path.
	$(CLUSTER) up

.PHONY: cluster-down
cluster-down: ## Stop the local cluster and remove its traces.
	$(CLUSTER) down --all

.PHONY: images
images: ## Build both images and import them into the local cluster's node.
	$(CLUSTER) images

.PHONY: fmt
fmt: sync ## Format the code and mend what can be mended.
	$(RUN) ruff format
	$(RUN) ruff check --fix
