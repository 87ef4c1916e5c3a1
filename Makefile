# Needs Python >= 3.11 and nothing else; everything is installed into $(VENV).
# The same without make: see README.md.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CACHE  := .cache

.PHONY: demo test lint bench clean

# Optimises a trained text-direction classifier and shows the report.
demo: $(VENV)/.cpu
	@mkdir -p $(CACHE)
	$(BIN)/graphc optimize examples/models/ppocr_cls.onnx -o $(CACHE)/demo.onnx

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Fetches and converts the models, measures graphc and its peers, and writes bench/results/ and README.md's table.
bench: $(VENV)/.dev $(CACHE)/peers/.installed $(CACHE)/torch/.installed
	$(BIN)/python bench/models.py
	$(CACHE)/torch/bin/python bench/torch_models.py
	$(BIN)/python bench/compile.py --peers $(CACHE)/peers/bin/python
	$(BIN)/python bench/tables.py

clean:
	rm -rf build dist $(CACHE)/demo.* .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cpu: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[cpu]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(CACHE)/%/.installed: bench/requirements-%.txt
	$(PYTHON) -m venv $(CACHE)/$*
	$(CACHE)/$*/bin/python -m pip install --quiet --requirement $<
	@touch $@
