# make demo   fine-tune a real model on real text with AdamW, SAM and LSAM; a table and a picture in demo/
#             more seeds: make demo SEEDS='0 1 2'; without downloads: make demo DEMO_MODEL=PATH DEMO_REVIEWS=PATH
# make test   lint, types and tests, as the continuous integration runs them
# make test-oldest  the tests with the oldest torch, transformers and accelerate that pyproject.toml allows
# make audit  look up what constraints.txt names in the database of known vulnerabilities
# make clean  remove the environment and the caches, but not demo/
# Environments are made in .venv with PYTHON (python3.11); nothing is installed outside of it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3.11
SEEDS ?= 0 1
DEMO_DIR ?= demo

.PHONY: help demo test test-oldest audit format clean

help:
	@sed -n '/^[^#]/q; s/^# //p' $(MAKEFILE_LIST)

demo: .venv/.installed-demo
	.venv/bin/python recipes/demo.py --output_dir '$(DEMO_DIR)' --seeds $(SEEDS) \
		$(if $(DEMO_MODEL),--model '$(DEMO_MODEL)') $(if $(DEMO_REVIEWS),--reviews '$(DEMO_REVIEWS)')

test: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest -n 2 --dist loadfile

test-oldest:
	'$(PYTHON)' -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable '.[test]'
	.venv-oldest/bin/pytest -n 2 --dist loadfile

audit:
	'$(PYTHON)' -m venv .venv-audit
	.venv-audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit
	.venv-audit/bin/pip-audit --disable-pip --no-deps --requirement constraints.txt

format: .venv/.installed-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# What is installed is kept until pyproject.toml or constraints.txt change (a stamp for each extra).
.venv/.installed-%: pyproject.toml constraints.txt
	@command -v '$(PYTHON)' >/dev/null || { echo "make: $(PYTHON) is not on the PATH. Install Python 3.11 or newer, \
	or say which one to use: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing hf-lsam[$*] into .venv (the first time takes a few minutes) ..."
	@'$(PYTHON)' -m venv .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-audit build *.egg-info .mypy_cache .pytest_cache .ruff_cache
