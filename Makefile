# `make test` and `make demo` work first thing on a clean clone: they make .venv when it is missing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup lint format test test-fast test-gpu bench bench-gpu demo clean

BIN := .venv/bin
READY := .venv/.ready
KERNELS := .venv/.kernels
SETUP_INPUTS := setup.py pyproject.toml tools/setup_venv.sh tools/vllm-cpu-shim/pyproject.toml
KERNEL_INPUTS := $(wildcard kernels/specplus_kernels/*/*.cpp kernels/specplus_kernels/*/*.h)

export VLLM_LOGGING_LEVEL ?= WARNING
export VLLM_NO_USAGE_STATS := 1
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): $(SETUP_INPUTS)
	@tools/setup_venv.sh

$(KERNELS): $(READY) $(KERNEL_INPUTS)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

setup: $(KERNELS) ## make .venv: engine, this package (editable), C++ kernels, tools
	@echo ".venv is ready"

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A process per core, of 8 at most; a file's tests stay in one (tests/conftest.py).
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(shell nproc) --maxprocesses 8 --no-loadscope-reorder --durations 20

test: $(KERNELS) ## the whole test suite (under 20 minutes on 2 cores)
	$(PYTEST)

test-fast: $(KERNELS) ## the tests that are not marked slow (3 to 4 minutes)
	$(PYTEST) -m "not slow"

demo: $(KERNELS) ## a real model, plain and with speculation, side by side
	$(BIN)/python -m benchmarks.e2e.demo

# On a GPU with nothing but torch, triton and pytest: no .venv, no vLLM. The compile gate, which needs
# no GPU and takes minutes, stays with `make test`.
GPU_PYTHON ?= PYTHONPATH=kernels python3

test-gpu: ## the kernels' tests on this machine's GPU, with its own python3
	$(GPU_PYTHON) -m pytest tests/kernels --deselect tests/kernels/test_compile_gate.py::test_served_kernels_do_not_spill

bench-gpu: ## the kernels' benchmarks on this machine's GPU (no op starts after 8 minutes)
	$(GPU_PYTHON) -m benchmarks.kernels

BENCH ?= --methods native-ngram "[ngram]:K=16:tree=dynamic:16" --batch-sizes 1 4 8 16 --limit 40

bench: $(KERNELS) ## end-to-end benchmark; make bench BENCH=--help lists its options
	$(BIN)/python -m benchmarks.e2e.generate $(BENCH)

clean: ## remove .venv and all that was built (results/ and the model cache stay)
	rm -rf .venv build dist ./*.egg-info tools/vllm-cpu-shim/{build,*.egg-info}
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f kernels/specplus_kernels/*.so
	find vllm_specplus kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
