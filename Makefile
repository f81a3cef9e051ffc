# Everything runs in a virtual environment in the checkout. It is made on first use and renewed when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train serve test quick exhaustive lint docs notebooks build clean

train: $(VENV)/.run
	$(BIN)/python train.py $(ARGS)

# Emulated servers, the gateway with a pretrained router, a load: open the page that it names.
serve: $(VENV)/.gateway
	$(BIN)/python -m jaxroute serve $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadscope $(ARGS)

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadscope -m 'not slow' $(ARGS)

exhaustive: $(VENV)/.dev
	XLA_FLAGS= $(BIN)/python -m pytest -n auto --dist loadscope -m exhaustive $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)
	@echo "The documentation is in site/index.html"

# Runs the notebooks again and keeps what they print.
notebooks: $(VENV)/.dev
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/jupyter-execute --inplace --NotebookClient.coalesce_streams=True \
	  --NotebookClient.record_timing=False docs/tutorial/*.ipynb
	rm -rf docs/tutorial/run

build: $(VENV)/.dev
	$(BIN)/python -m build $(ARGS)

# What runs the project, what its developers need, and what makes the documentation.
$(VENV)/.run: EXTRA :=
$(VENV)/.gateway: EXTRA := [gateway]
$(VENV)/.dev: EXTRA := [dev]
$(VENV)/.docs: EXTRA := [docs]
INSTALL = pip install --quiet --constraint constraints.txt --editable '.$(EXTRA)'

# uv installs several times faster than pip; pip does the work where uv cannot be had or finds no packages.
$(VENV)/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("jaxroute needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing what is needed into $(VENV)"
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
	  || echo "uv cannot be installed here"
	@if test -x $(BIN)/uv && $(BIN)/uv $(INSTALL) --python $(BIN)/python; then :; else \
	  echo "pip installs the packages, which takes longer"; \
	  $(BIN)/python -m $(INSTALL) --disable-pip-version-check; fi
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache build dist site
