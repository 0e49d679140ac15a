# Every target works on a fresh machine with python3 (3.11 or later), git and make.
#
#   make demo [PROMPT="..."]   set up, pull a small model, serve it, ask it a question
#   make test                  lint, types, protos, tests
#   make nightly               what takes longer than a merge may wait
#   make simulate SEEDS=500    the router on a virtual clock, with everything going wrong
#   make gpu                   the tests that need an NVIDIA GPU
#   make sanitize              its kernels under compute-sanitizer (part of the CUDA toolkit)
#
# TORCH_INDEX=url installs torch from that index, for instance PyTorch's public CPU one: without
# it, a plain Linux machine gets the CUDA build from PyPI, several gigabytes of it.

PYTHON ?= python3
SEEDS ?= 500
PROMPT ?= Explain in two sentences why the sky is blue.
TORCH_INDEX ?=
# For the shell to take as it is, quotes and dollars included.
export PROMPT_TEXT := $(value PROMPT)
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

# Only our kernels: a C++ name is mangled, and cuBLAS's others are called gemm.
SANITIZER := compute-sanitizer --error-exitcode 1 --report-api-errors no \
	--kernel-name-exclude kns=_Z --kernel-name-exclude kns=gemm

.PHONY: demo test nightly simulate gpu sanitize lint types protos clean

demo: .venv/.mili
	$(BIN)/mili pull smollm2-135m
	@$(BIN)/python examples/demo.py "$$PROMPT_TEXT"

test: .venv/.dev lint types
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"
	$(MAKE) simulate

nightly: .venv/.dev
	MILI_FUZZ_CALLS=200000 MILI_FUZZ_SECONDS=600 $(BIN)/pytest -m "not gpu"
	$(MAKE) simulate SEEDS=10000

simulate: .venv/.dev
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)

gpu: .venv/.dev
	$(BIN)/pytest -m gpu tests/gpu

# Without PyTorch's cache, so that every tensor ends where its memory ends.
sanitize: .venv/.dev
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool \
			$(BIN)/python -m pytest --timeout 600 -m sanitize tests/gpu || exit 1; \
	done

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos

types: .venv/.dev .build/types
	MYPYPATH=.build/types $(BIN)/mypy -p mili

protos: .venv/.dev
	$(BIN)/python protos/generate.py

# The mypy checker cannot follow an editable install: it reads the packages through these links.
.build/types: pyproject.toml
	rm -rf $@ && mkdir -p $@/mili
	for room in router worker kernels hub client cli; do ln -s ../../../$$room $@/mili/$$room; done
	ln -s ../../../protos/mili/v1 $@/mili/v1
	ln -s ../../../protos/mili/internal $@/mili/internal

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.torch: | .venv/bin/python
	$(PIP) install 'torch>=2.11,<2.14' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

.venv/.mili: pyproject.toml .venv/.torch
	$(PIP) install --editable '.[router,worker,http]'
	touch $@

# A compiler for tests without a GPU, of one version, since register counts differ from version to
# version; apart from the other packages, since PyTorch builds for CUDA pin some of these otherwise.
NVCC := $(patsubst %,'nvidia-%==13.0.*',cuda-nvcc cuda-crt cuda-runtime cuda-cccl nvvm)

.venv/.nvcc: Makefile | .venv/bin/python
ifeq ($(shell uname),Linux)
	$(PIP) install --upgrade --no-deps --target .venv/nvcc $(NVCC)
endif
	touch $@

.venv/.dev: pyproject.toml .venv/.mili .venv/.nvcc
	$(PIP) install --editable '.[router,worker,http,cuda13,dev]'
	touch $@

clean:
	rm -rf .venv .build build dist mili.egg-info
