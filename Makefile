PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

PYTHON310 ?= python3.10
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.installed

PYTEST := -m pytest -q -n 2 --dist loadfile

.PHONY: help demo test test-fast test-oldest lint bench bench-gpu faults docs hero gpu-mnist gpu-cifar10 clean

help:
	@echo "make demo   train, sample and compare on handwritten digits, on the CPU; results in runs/demo"
	@echo "make test   linters, types and tests"
	@echo "make test-fast    the tests that train nothing, in little more than a minute"
	@echo "make test-oldest  the same on Python 3.10 with the oldest versions that are supported (oldest.txt)"
	@echo "make lint   linters and types only"
	@echo "make bench  what everything costs beside its peers; minutes, into benchmarks/results.json"
	@echo "make bench-gpu  the parts that concern one GPU, into benchmarks/results_gpu.json; a second call measures what is missing"
	@echo "make faults kills, damaged files and full disks tried on small runs; minutes, into docs/faults.json"
	@echo "make gpu-mnist  few calls, and the original study, on MNIST at its own size, for one GPU, in slices of nine minutes"
	@echo "make gpu-cifar10  the original study of priors, and few calls, on CIFAR-10 at its own size, likewise"
	@echo "make docs   the documentation as a site, into build/site"
	@echo "make hero   the picture of the README, from the models in this repository; minutes, into docs/hero.png"
	@echo "make clean  remove the environments and caches, keep runs/"

demo: $(INSTALLED)
	$(VENV)/bin/ot-diffusers demo --output runs/demo

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) --durations=15

test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) -m fast

test-oldest: $(OLDEST_INSTALLED)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m fast

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks

bench-gpu: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks --resume --only solver training couplings sampling package --output benchmarks/results_gpu.json

faults: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.faults --output docs/faults.json

docs: $(INSTALLED)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e ".[docs]"
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs build/site
	@echo "Open build/site/index.html"

hero: $(INSTALLED)
	$(VENV)/bin/python docs/hero.py

# Exit status 3 says that a slice's time is over.
define in_slices
	@status=3; while [ $$status -eq 3 ]; do \
		$(VENV)/bin/ot-diffusers $(1) --max-seconds 540; status=$$?; done; exit $$status
endef

gpu-mnist: $(INSTALLED)
	$(call in_slices,compare --config mnist/few_calls_full.yaml)
	$(call in_slices,compare --config mnist/original.yaml)

gpu-cifar10: $(INSTALLED)
	$(call in_slices,truncation --config cifar10/truncation.yaml)
	$(call in_slices,compare --config cifar10/few_calls.yaml)

$(INSTALLED): pyproject.toml
	@echo "Installing ot-diffusers, PyTorch and the Hugging Face libraries into $(VENV): a few minutes, once."
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@

$(OLDEST_INSTALLED): pyproject.toml oldest.txt
	@echo "Installing the oldest versions that are supported into $(OLDEST): a few minutes, once."
	@test -x $(OLDEST)/bin/python || $(PYTHON310) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -e ".[all,test]" -c oldest.txt
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist .mypy_cache .pytest_cache .ruff_cache
	find ot_diffusers train tests -name __pycache__ -type d -prune -exec rm -rf {} +
