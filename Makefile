# One verb per task, the same on a laptop and in CI. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
BIN := $(VENV)/bin
SOURCES := operator checkpoint health trainer_image local bench tests

help:            ## list the verbs
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

setup: $(VENV)/.ready ## make .venv from the locked requirements, install missing Debian packages

$(VENV)/.ready: requirements/dev.txt requirements/uv.txt pyproject.toml tools/setup.sh tools/build_kernel.py \
  checkpoint/stormjib_checkpoint/digest/kernel.c
	tools/setup.sh $(VENV)
	touch $@

demo: setup       ## train on a real local cluster, through faults
	$(PY) -m bench.demo

test: setup       ## everything that CI runs: check, unit, processes, cluster
	# With nothing cached the Go tools take ten minutes of both cores: build them behind the quicker tests.
	mkdir -p build
	nice -n 19 $(PY) -m stormjib_local.tools > build/tools.log 2>&1 & tools=$$!; \
	  $(MAKE) --no-print-directory check test-unit test-process || { kill $$tools 2>/dev/null; exit 1; }; \
	  wait $$tools || { cat build/tools.log; exit 1; }
	$(MAKE) --no-print-directory test-cluster

test-unit: setup  ## pure cores, seconds
	$(BIN)/pytest -n auto tests/unit

test-process: setup ## real processes, torch over Gloo
	# Two files at a time: much of it is waiting.
	$(BIN)/pytest -n 2 --dist loadfile tests/process

test-cluster: setup ## a real Kubernetes cluster on this machine (root)
	# Two files at a time, each on a cluster of its own; then those that a second cluster would make late.
	$(BIN)/pytest -n 2 --dist loadfile -m "not alone" tests/cluster
	$(BIN)/pytest -m alone tests/cluster

check: setup      ## ruff, mypy strict, import contracts
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: setup        ## format the code
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

verify: setup     ## regenerate what is generated, fail if it differs
	$(PY) -m stormjib_operator.crd charts/stormjib/templates
	git diff --exit-code charts

bench: setup      ## every benchmark, tables on the terminal
	$(PY) -m bench.recovery
	$(PY) -m bench.health --quick
	$(PY) -m bench.health_cost
	$(PY) -m bench.health_sampler --quick
	$(PY) -m bench.health_engine --quick
	$(PY) -m bench.health_integrity --quick
	$(PY) -m bench.coordinator --quick
	$(PY) -m bench.exact --quick
	$(PY) -m bench.isolation --quick
	$(PY) -m bench.bursts --quick
	$(PY) -m bench.checkpoint --quick
	$(PY) -m bench.restore --quick
	$(PY) -m bench.reshard --quick
	$(PY) -m bench.store_client --quick
	$(PY) -m bench.copies --quick
	$(PY) -m bench.digest --quick
	$(PY) -m bench.index --quick

reshard-table: setup ## every row of the resharding table, written to docs/reshard.md
	PYTHONPATH=tests $(PY) -m fakes.reshard_table docs/reshard.md

lock: setup       ## write requirements/*.txt anew
	$(BIN)/uv pip compile pyproject.toml --extra demo --extra s3 --group lint --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header -c requirements/constraints.in -o requirements/dev.txt
	echo uv | $(BIN)/uv pip compile - --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header -o requirements/uv.txt

clean:            ## remove the virtual environment and build output (the tool cache in the home folder stays)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

.PHONY: help setup demo test test-unit test-process test-cluster check fmt verify bench reshard-table lock clean
