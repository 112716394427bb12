# make demo   fine-tune a real model on real text with AdamW, SAM and LSAM; a table and a picture in demo/
#             more seeds: make demo SEEDS='0 1 2'; without downloads: make demo DEMO_MODEL=PATH DEMO_REVIEWS=PATH
# make test   lint, types and tests, as in the continuous integration
# make test-oldest   the library's tests with the oldest torch, transformers and accelerate that pyproject.toml allows,
#             with the oldest Python that is installed: OLDEST_PYTHON=PATH
# make test-kernels  the numerical tests with the kernels of other CPUs, with one thread and with two
# make test-newest   the tests with the newest version of everything, with the newest Python: NEWEST_PYTHON=PATH
# make docs   build the documentation site into site/; warnings are errors
# make audit  check the packages of constraints.txt against the database of known vulnerabilities
# make clean  remove the environments and the caches, but not demo/
# The environment is .venv, made with PYTHON (python3.11); nothing is installed outside of the environments.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3.11
# The first interpreter that is installed.
at_hand = $(firstword $(foreach python,$(1),$(shell $(python) -c 'import sys; print(sys.executable)' 2>/dev/null)))
OLDEST_PYTHON ?= $(call at_hand,python3.10 python3.11 python3.12)
NEWEST_PYTHON ?= $(call at_hand,python3.13 python3.12 python3.11 python3.10)
SEEDS ?= 0 1
DEMO_DIR ?= demo

# Tests that compare two computations in one process: no recipes, launches, or trainers of other libraries.
KERNEL_TESTS = $(patsubst %,tests/library/test_%.py, \
	16_bit_weights batches_and_buffers changes compile counters faults honest life off peft perturbation \
	precision quantised replay replayed_steps restored restored_always right savers second_pass_blocks \
	second_pass_check second_pass_gradients selection split state step trainers untouched unusual_losses) \
	$(patsubst %,tests/recipes/test_%.py,resnets sharpness staleness)

.PHONY: help demo test test-oldest test-newest test-kernels docs audit format clean

help:
	@sed -n '/^[^#]/q; s/^# //p' $(MAKEFILE_LIST)

demo: .venv/.installed-demo
	.venv/bin/python recipes/demo.py --output_dir '$(DEMO_DIR)' --seeds $(SEEDS) \
		$(if $(DEMO_MODEL),--model '$(DEMO_MODEL)') $(if $(DEMO_REVIEWS),--reviews '$(DEMO_REVIEWS)')

test: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@test -e hf_lsam_recipes || ln -s recipes hf_lsam_recipes  # which an sdist lacks
	.venv/bin/mypy
	.venv/bin/pytest -n 2 --dist loadfile

test-oldest:
	'$(OLDEST_PYTHON)' -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -qq --disable-pip-version-check --requirement constraints-oldest.txt \
		--editable .
	.venv-oldest/bin/pytest -n 2 --dist loadfile

test-newest:
	'$(NEWEST_PYTHON)' -m venv .venv-newest
	.venv-newest/bin/python -m pip install -qq --disable-pip-version-check --upgrade --upgrade-strategy eager \
		--editable '.[test]'
	.venv-newest/bin/pytest -n 2 --dist loadfile

# MKL has a variable of its own.
test-kernels: .venv/.installed-test
	@for kernels in 'ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE' ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2; \
	do for threads in 1 2; do \
		echo "$$kernels TEST_THREADS=$$threads"; \
		env $$kernels TEST_THREADS=$$threads OMP_WAIT_POLICY=passive .venv/bin/pytest -n 2 --dist loadfile \
			$(KERNEL_TESTS); \
	done; done

docs: .venv/.installed-test
	@test -e hf_lsam_recipes || ln -s recipes hf_lsam_recipes  # which an sdist lacks
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

audit:
	'$(PYTHON)' -m venv .venv-audit
	.venv-audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit
	.venv-audit/bin/pip-audit --disable-pip --no-deps --requirement constraints.txt

format: .venv/.installed-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# One stamp for each extra: it is installed again when pyproject.toml or constraints.txt change.
.venv/.installed-%: pyproject.toml constraints.txt
	@command -v '$(PYTHON)' >/dev/null || { echo "make: $(PYTHON) is not on the PATH. Install Python 3.11 or newer, \
	or say which one to use: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing hf-lsam[$*] into .venv (the first time takes a few minutes) ..."
	@'$(PYTHON)' -m venv .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-audit .venv-release .venv-wheel build site *.egg-info .mypy_cache .pytest_cache .ruff_cache
