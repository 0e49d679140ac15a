# Every target works on a fresh machine with python3 (3.11 or later), git and make.
#
#   make demo [PROMPT="..."]   set up, pull a small model, serve it, ask it a question
#   make test                  lint, types, protos, tests
#   make nightly               what takes longer than a merge may wait
#
# TORCH_INDEX=url installs torch from that index, for instance PyTorch's public CPU one: without
# it, a plain Linux machine gets the CUDA build from PyPI, several gigabytes of it.

PYTHON ?= python3
PROMPT ?= Explain in two sentences why the sky is blue.
TORCH_INDEX ?=
# For the shell to take as it is, quotes and dollars included.
export PROMPT_TEXT := $(value PROMPT)
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: demo test nightly lint types protos clean

demo: .venv/.mili
	$(BIN)/mili pull smollm2-135m
	@$(BIN)/python examples/demo.py "$$PROMPT_TEXT"

test: .venv/.dev lint types
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

nightly: .venv/.dev
	$(BIN)/pytest -m "not gpu"

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
	$(PIP) install --editable '.[router,worker]'
	touch $@

.venv/.dev: pyproject.toml .venv/.mili
	$(PIP) install --editable '.[router,worker,dev]'
	touch $@

clean:
	rm -rf .venv .build build dist mili.egg-info
