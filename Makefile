# Four verbs: demo, test, check, bench. Each installs what it needs into .venv first; a second call starts at once.
#
# On a machine with its own torch (built for its GPU, or preinstalled):
#   make demo CONSTRAINTS= VENV_FLAGS=--system-site-packages

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2

PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
PACKAGES = plexor plexor_llama plexor_moe plexor_blip2 plexor_quant plexor_demo
STAMP = $(VENV)/.installed-for-development

.PHONY: demo test check bench install index
.DEFAULT_GOAL := install

demo: $(STAMP)
	$(VENV)/bin/plexor generate
	$(VENV)/bin/plexor generate --model demo-moe
	$(VENV)/bin/plexor generate --precision fp8
	$(VENV)/bin/plexor generate --precision w4a_fp8
	$(VENV)/bin/plexor caption

# Each process gets one thread: there are as many of them as cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(foreach package,$(PACKAGES),-p $(package))
	$(VENV)/bin/python -m pytest -q tests/test_boundaries.py

bench: $(STAMP)
	$(VENV)/bin/python bench/cpu.py
	$(VENV)/bin/plexor bench --model demo --workloads decode_bs1,decode_bs8 --device cpu

# What the known plugins offer, for the errors about plugins that are not installed.
index: $(STAMP)
	$(VENV)/bin/python -m plexor.extension.index $(patsubst plugins/%/pyproject.toml,plexor-%,$(wildcard plugins/*/pyproject.toml))

install: $(STAMP)

# hatchling and editables are installed first so that six builds share them; requirements-dev.txt lists the six.
$(STAMP): pyproject.toml requirements-dev.txt $(CONSTRAINTS) $(wildcard plugins/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
	  echo "Plexor needs Python 3.11 or 3.12, and $(PYTHON) is $$($(PYTHON) --version 2>&1): try make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into $(VENV); the first time takes a few minutes" >&2
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PIP_INSTALL) hatchling editables
	$(PIP_INSTALL) --no-build-isolation -r requirements-dev.txt
	@touch $@
