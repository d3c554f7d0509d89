# Everything is set up by the targets themselves; a fresh Debian/Ubuntu needs python3 (>= 3.11) with venv, and make.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONDONTWRITEBYTECODE ?= 1

ENGINE ?= emulated
TRACE ?=
PEERS ?= nginx,vllm-router,sglang-router
PYTEST_ARGS ?=
PARALLEL ?= -n 2 --dist loadfile

.PHONY: help demo up test test-source test-wheel test-vllm test-vllm-operations lint bench-profiler soak proto lock replay-mooncake bench-calibration bench-decision bench-kvevents bench-dataplane bench-probes bench-controlplane clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

$(STAMP): requirements/dev.lock pyproject.toml
	@scripts/setup.sh "$(PYTHON)" "$(VENV)"

setup: $(STAMP) ## create .venv with pinned dependencies

demo: $(STAMP) ## one workload under three routing policies (ENGINE=vllm: two real engines)
	@ENGINE=$(ENGINE) scripts/demo.sh

up: $(STAMP) ## keep a fleet running (FLEET=fleet.yaml, ENGINE=emulated|vllm)
	@ENGINE=$(ENGINE) scripts/up.sh $(FLEET)

test: lint test-source test-wheel ## every test that needs no multi-GB download

lint: $(STAMP) ## ruff, mypy --strict, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-source: $(STAMP)
	$(BIN)/python -m pytest tests/unit tests/contract tests/integration $(PARALLEL) $(PYTEST_ARGS)

test-wheel: $(STAMP)
	@PARALLEL="$(PARALLEL)" scripts/test_wheel.sh $(PYTEST_ARGS)

test-vllm: $(STAMP) ## tests on two real vLLM engines (installs vLLM CPU, several GB, outside the checkout)
	@scripts/test_vllm.sh $(PYTEST_ARGS)

test-vllm-operations: $(STAMP) ## tests on a dozen real vLLM engines, one for each set of flags (ten minutes and more)
	@VLLM_OPERATIONS=1 scripts/test_vllm.sh $(PYTEST_ARGS)

replay-mooncake: $(STAMP) ## replay TRACE=path of a Mooncake trace through 2 replicas x 2 relays, 16 engines
	@test -n "$(TRACE)" || { echo "usage: make replay-mooncake TRACE=path/to/mooncake_trace.jsonl[.gz]" >&2; exit 2; }
	@$(BIN)/twofold demo --workload mooncake --trace "$(TRACE)" $(ARGS)

bench-decision: $(STAMP) ## cost of one routing decision
	@$(BIN)/python benchmarks/bench_decision.py

bench-kvevents: $(STAMP) ## taking in KV events, looking prompts up, hashing them
	@$(BIN)/python benchmarks/bench_kvevents.py $(ARGS)

bench-probes: $(STAMP) ## CPU of probing 100 workers, and of an engine per scrape (ARGS=--vllm: a real one)
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_probes.py $(ARGS)

bench-controlplane: $(STAMP) ## 1,000 targets, 20 routers: CPU, age of views, reconnect storm
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_controlplane.py $(ARGS)

bench-dataplane: $(STAMP) ## CPU per request and event beside PEERS=nginx,vllm-router,sglang-router (installs them)
	@$(BIN)/python benchmarks/bench_dataplane.py --peers "$(PEERS)" $(ARGS)

bench-calibration: $(STAMP) ## a measured profile: emulator beside the real engine, same requests (installs vLLM CPU)
	@TWOFOLD_VLLM_VENV=$$(scripts/install_vllm.sh) $(BIN)/python benchmarks/bench_calibration.py $(ARGS)

bench-profiler: $(STAMP) ## cost of a profile to the process that is profiled
	@$(BIN)/python benchmarks/bench_profiler.py $(ARGS)

soak: $(STAMP) ## 2,000 verified streams for 15 min through one replica (ARGS="--streams N --minutes M")
	@$(BIN)/python benchmarks/soak.py $(ARGS)

proto: $(STAMP) ## generate twofold/v1 from proto/
	@PYTHON=$(BIN)/python scripts/generate_proto.sh

lock: $(STAMP) ## pin the dependencies anew
	@PYTHON=$(BIN)/python scripts/lock.sh

clean: ## remove what the targets made
	rm -rf $(VENV) build dist .run .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
