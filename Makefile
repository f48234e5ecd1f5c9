# Every target sets up what it needs by itself: a virtual environment in .venv, and for some the real servers.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PY := .venv/bin/python
MINUTES ?= 10

.PHONY: help setup services demo test test-fast check format bench eval-tiny train-tiny faults soak stack interpreted gpu docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup:
	@.ci/setup

services:
	@.ci/setup services

demo: setup  ## cache on against cache off, then a story: the two things to see first
	.venv/bin/axon compare -n 256 --plot var/compare.svg
	.venv/bin/axon generate "Once upon a time" -n 120 --seed 7

test: services  ## all tests, integration on private RabbitMQ, Redis and nginx servers
	$(PY) -m pytest

test-fast: setup  ## unit and parity tests only
	$(PY) -m pytest tests/unit tests/parity tests/structure -m "not slow"

check: setup  ## format, lint, types
	$(PY) -m ruff format --check .
	.venv/bin/clang-format --dry-run --Werror axon_llm/fast/kernels/* tests/unit/matrix_unit.h
	$(PY) -m ruff check .
	$(PY) -m mypy

format: setup  ## put the code into the project's format
	$(PY) -m ruff format .
	.venv/bin/clang-format -i axon_llm/fast/kernels/* tests/unit/matrix_unit.h
	$(PY) -m ruff check --fix .

bench: setup  ## measure, and write docs/benchmarks.md
	$(PY) -m cli.benchmarks

eval-tiny: setup  ## evaluate the checkpoint that ships
	$(PY) -m weights.evaluate

train-tiny: setup  ## train the checkpoint that ships, from nothing
	$(PY) -m weights.train

faults: services  ## the fault matrix, as a table
	$(PY) -m tests.faults.matrix

soak: services  ## random faults for MINUTES (default 10), and a report
	$(PY) -m tests.faults.soak --minutes $(MINUTES)

stack: services  ## RabbitMQ, Redis, nginx, a session manager and two workers on free ports; Ctrl-C stops them
	$(PY) -m deploy.stack

interpreted: setup  ## the GPU kernels' arithmetic, without a GPU, by Triton's interpreter
	$(PY) -m pip install -q --upgrade --no-deps --target var/interpreter "triton>=3.6,<3.8" "numpy<2.4"
	PYTHONPATH=var/interpreter $(PY) -m pytest tests/unit/test_gpu_interpreted.py

docs: setup  ## write docs/cli.md from the commands' own help
	$(PY) -m cli.reference > docs/cli.md

GPU_PY ?= $(shell [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
gpu:  ## GPU tests and benchmarks on one card, from the source tree, with whatever Python is there (GPU_PY=…)
	$(GPU_PY) -m axon_llm.bench.gpu

clean:  ## remove what the targets above made
	rm -rf .venv var build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
