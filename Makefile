# The two commands of a newcomer are `make distill` and `make test`; both set up .venv first, once.

# Nothing of the caller's Python may leak into .venv.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

PYTHON ?= $(shell command -v python3.11 || echo python3)
TORCH := torch==2.13.0+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.lock
GPU_LOCK := requirements/gpu.lock
READY := $(VENV)/ready
GPU_VENV := .venv-gpu
GPU_READY := $(GPU_VENV)/ready
GPU_ARGS ?=

# $(call install_torch,BIN): pip first asks where its own configuration points, and then PyTorch's index of CPU builds.
define install_torch
$(1)/python -m pip install --quiet --no-deps $(TORCH) \
	|| $(1)/python -m pip install --quiet --no-deps --index-url $(TORCH_CPU_INDEX) $(TORCH)
endef

.DEFAULT_GOAL := help
.PHONY: help setup distill test quick drills lint gpu lock lock-gpu clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## Set up .venv for the CPU, as requirements/cpu.lock says

# Where .venv already holds something, installing changes only what differs.
# The list goes through uv: 204 packages took it 18 s, pip 148 s (two cores, no cache). pip is the second way, for a machine
# whose package source only pip's configuration knows; torch is always pip's, because of that same configuration. What is installed
# is compiled once: else each of the many processes of a run may compile it anew, as long as nobody may write beside it
# (PYTHONDONTWRITEBYTECODE), and importing what a training worker needs takes 13 CPU seconds in the place of 7.
$(READY): $(LOCK) pyproject.toml scripts/check_environment.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
		|| { echo "setup needs Python 3.11, and '$(PYTHON)' is not it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setup: $(VENV) is made or brought up to date; a new one downloads about 1.1 GB"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "setup: $(TORCH)"
	@$(call install_torch,$(BIN))
	@echo "setup: $$(grep -c == $(LOCK)) packages of $(LOCK)"
	@{ $(BIN)/python -m pip install --quiet uv \
		&& $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps -r $(LOCK); } \
		|| $(BIN)/python -m pip install --quiet --no-deps -r $(LOCK)
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python scripts/check_environment.py
	@touch $@

distill: $(READY)  ## Distil the example: fine-tune teacher, score, train student, evaluate, report
	@$(BIN)/python -m orchestrator run configs/tiny_cpu.yaml

# All run two at a time; of those that need Ray or long, the ones of a file one after the other, since they share what they made.
test: $(READY)  ## Run lint and every test; PYTEST_ARGS="tests/losses -k atkd" runs some
	@failed=0; $(MAKE) --no-print-directory lint || failed=1; \
	if [ -n "$(PYTEST_ARGS)" ]; then $(BIN)/python -m pytest -q $(PYTEST_ARGS) || failed=1; else \
		$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not ray" || failed=1; \
		$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or ray" || failed=1; \
	fi; exit $$failed

quick: $(READY)  ## Run lint and the tests that need neither Ray nor long, in parallel
	@failed=0; $(MAKE) --no-print-directory lint || failed=1; \
		$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not ray" $(PYTEST_ARGS) || failed=1; exit $$failed

drills: $(READY)  ## Break things on purpose, as docs/reliability.md lists them, and print what came of each
	@$(BIN)/python scripts/drills.py $(PYTEST_ARGS)

lint: $(READY)  ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# An environment of its own, since what is built for GPUs cannot stand beside what is built for CPUs. It downloads about 5 GB once.
gpu: $(GPU_READY)  ## On a machine with GPUs: try what only they can show, within an hour, and write docs/results_gpu.md
	@$(GPU_VENV)/bin/python -m scripts.gpu_check $(GPU_ARGS)

$(GPU_READY): $(GPU_LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
		|| { echo "gpu needs Python 3.11, and '$(PYTHON)' is not it: make gpu PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "gpu: $(GPU_VENV) is made or brought up to date from $(GPU_LOCK)"
	@test -x $(GPU_VENV)/bin/pip || $(PYTHON) -m venv $(GPU_VENV)
	@$(GPU_VENV)/bin/python -m pip install --quiet uv
	@$(GPU_VENV)/bin/uv pip install --quiet --compile-bytecode --python $(GPU_VENV)/bin/python --no-deps -r $(GPU_LOCK)
	@$(GPU_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Resolves pyproject.toml afresh in an environment of its own, so the newest versions that fit are taken.
lock: LOCK_ENV := build/lock-env
lock:  ## Make requirements/cpu.lock anew, and gpu.lock after it
	rm -rf $(LOCK_ENV)
	$(PYTHON) -m venv $(LOCK_ENV)
	$(call install_torch,$(LOCK_ENV)/bin)
	$(LOCK_ENV)/bin/python -m pip install --quiet uv
	$(LOCK_ENV)/bin/uv pip install --quiet --python $(LOCK_ENV)/bin/python --override requirements/absent.txt \
		-r pyproject.toml --extra cpu --extra benchmarks --extra azure --extra onnx --extra dev
	{ grep '^#' $(LOCK); $(LOCK_ENV)/bin/uv pip freeze --quiet --python $(LOCK_ENV)/bin/python | grep -v -E '^(torch|uv|pip)=='; } \
		> build/cpu.lock
	mv build/cpu.lock $(LOCK)
	rm -rf $(LOCK_ENV)
	$(MAKE) --no-print-directory lock-gpu

# Resolved without installing anything, for the oldest Linux for which all are there as wheels. uv keeps the versions of a file that
# is there before it, as far as requirements allow: here those of cpu.lock, which are the tested ones. rouge-score has no wheel.
lock-gpu: LOCK_ENV := build/lock-gpu-env
lock-gpu:  ## Make requirements/gpu.lock anew, as near to cpu.lock as its packages allow
	rm -rf $(LOCK_ENV)
	$(PYTHON) -m venv $(LOCK_ENV)
	$(LOCK_ENV)/bin/python -m pip install --quiet uv
	cp $(LOCK) build/gpu.lock
	$(LOCK_ENV)/bin/uv pip compile --quiet --no-header --no-annotate --only-binary :all: --no-binary rouge-score \
		--python-version 3.11 --python-platform x86_64-manylinux_2_31 \
		pyproject.toml --extra vllm --extra dev --output-file build/gpu.lock
	{ grep '^#' $(GPU_LOCK); grep == build/gpu.lock; } > build/gpu.lock.new
	mv build/gpu.lock.new $(GPU_LOCK)
	rm -rf $(LOCK_ENV) build/gpu.lock

clean:  ## Remove .venv, build products and caches; runs/ stays
	rm -rf $(VENV) $(GPU_VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
