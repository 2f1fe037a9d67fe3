# Concord. Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
STUBS := client/concord/v1/.generated
PROTOS := $(wildcard protos/concord/v1/*.proto)

.PHONY: help install stubs demo test test-long test-unit fuzz audit chaos quality lint format serve sbom dependency-audit bench clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

install: $(INSTALLED) stubs ## Install everything, pinned, into .venv and generate the stubs.

$(INSTALLED): pyproject.toml client/pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Concord needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e ./client -e '.[training,tracking,embedded,reports,dev]'
	@touch $@

stubs: $(STUBS) ## Generate the gRPC stubs from protos/.

$(STUBS): $(PROTOS) | $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=client --pyi_out=client --grpc_python_out=client $(PROTOS)
	@touch $@

demo: install ## The main job end to end on the sample shop: import, train, publish, serve, five channels.
	$(BIN)/concord demo

test: install ## Run the suite, but for what test-long runs, on embedded real servers.
	$(BIN)/python -m pytest

test-long: install ## Run the tests of a minute each that the whole suite leaves out (three, about 3 min).
	$(BIN)/python -m pytest -m long

test-unit: install ## Run the tests that need no server.
	$(BIN)/python -m pytest tests/unit tests/docs

fuzz: install ## Fuzz every method with 105,000 cases; ends with a line of JSON.
	$(BIN)/python -m tests.fuzz

audit: install ## Prove the guarantees under load and faults, with counts; ends with a line of JSON.
	$(BIN)/python -m tests.guarantees

chaos: install ## Break every process and store: the suite under injected faults, then 36 rows of faults (about 10 min).
	INJECT_FAULTS=$(or $(SEED),7) $(BIN)/python -m pytest -q tests/integration/test_promise.py tests/integration/test_identity.py tests/faults/test_injected.py
	$(BIN)/python -m tests.faults --seed $(or $(SEED),7)

quality: install ## Train on a public set (SET=beauty|cold|online_retail|search|faq|intents|sentiment, SEED=0) and write the judge's file (OUT=rankings.jsonl).
	$(BIN)/python -m training.quality $(or $(SET),beauty) --seed $(or $(SEED),0) --out $(or $(OUT),rankings.jsonl) $(if $(DATA),--data $(DATA)) $(if $(WITHOUT),--without $(WITHOUT))

bench: install ## Measure speed and memory beside peers and limits (ONLY="recommend ingest" for some); about 40 minutes.
	$(BIN)/python bench/run_all.py $(ONLY)

lint: install ## Check style, types, arrows and configuration files.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/yamllint -s deploy features/feature_store.yaml

format: install ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: install ## Keep an embedded stack and the server up, and print how to call it.
	$(BIN)/concord serve

sbom: install ## List everything installed, as CycloneDX JSON, in build/sbom.json.
	@mkdir -p build
	$(BIN)/cyclonedx-py environment --of JSON --output-reproducible -o build/sbom.json $(BIN)/python
	@echo "wrote build/sbom.json"

dependency-audit: install ## Look the pinned dependencies up in the vulnerability database; needs the network, fails without.
	$(BIN)/pip-audit --strict --progress-spinner off --disable-pip --no-deps -r constraints.txt

clean: ## Remove the venv, generated stubs and local data.
	rm -rf $(VENV) .data build dist client/concord/v1/*_pb2* client/concord/v1/.generated
