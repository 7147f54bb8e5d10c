PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint bench faults docs clean

help:
	@echo "make demo   train, sample and compare on handwritten digits, on the CPU; results in runs/demo"
	@echo "make test   linters, types and tests"
	@echo "make lint   linters and types only"
	@echo "make bench  what everything costs beside its peers; minutes, into benchmarks/results.json"
	@echo "make faults kills, damaged files and full disks tried on small runs; minutes, into docs/faults.json"
	@echo "make docs   the documentation as a site, into build/site"
	@echo "make clean  remove the environment and caches, keep runs/"

demo: $(INSTALLED)
	$(VENV)/bin/ot-diffusers demo --output runs/demo

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks

faults: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.faults --output docs/faults.json

docs: $(INSTALLED)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e ".[docs]"
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs build/site
	@echo "Open build/site/index.html"

$(INSTALLED): pyproject.toml
	@echo "Installing ot-diffusers, PyTorch and the Hugging Face libraries into $(VENV): a few minutes, once."
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find ot_diffusers train tests -name __pycache__ -type d -prune -exec rm -rf {} +
