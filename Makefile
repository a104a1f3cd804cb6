# make demo | test | test-integrations | lint | docs | nightly.
# TORCH_INDEX chooses another build of torch, e.g. .../whl/cu130 or .../whl/cpu.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-integrations lint docs nightly clean

# Train, prove that an exact global minimum lies next to the weights, have an independent program check the proof.
demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/surefoot train --data digits --limit 300 --model mlp --width 256 --depth 1 --activation tanh --loss mse \
		--lr 0.5 --gamma 0.1 --delta 0.5 --lr-schedule cosine --epochs 300 --threads 1 --out runs/demo
	$(BIN)/surefoot certify runs/demo
	$(BIN)/surefoot verify runs/demo/certificate
	@echo "the report: $(CURDIR)/runs/demo/report.html"

# Two processes of one thread each: a file's tests stay in one of them.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-integrations: $(VENV)/.installed-integrations
	$(BIN)/python -m pytest tests/integrations

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The site, into build/site; a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site: $(CURDIR)/build/site/index.html"

nightly: $(VENV)/.installed-dev
	SUREFOOT_NIGHTLY=1 $(BIN)/python -m pytest -m nightly

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "surefoot needs Python 3.11 or newer; try make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(if $(TORCH_INDEX),$(PIP) torch --index-url $(TORCH_INDEX))
	$(PIP) -e '.[all]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.installed-integrations: pyproject.toml constraints.txt | $(VENV)/.installed-dev
	$(PIP) -e '.[integrations]'
	touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@
