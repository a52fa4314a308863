# Works on a machine that has python3 (3.11 or newer) and pip, nothing else. Everything is installed into .venv.
#
#   make test    the tests                       make slow    the long property runs
#   make test-integrations    the tests of fxpar.integrations, with the libraries that it is for
#   make demo    train a tiny model on 4 CPU processes and compare with one device
#   make lint    ruff and mypy                   make clean   remove .venv and caches
#   make docs    the documentation, into site/   make browser look at reports in a headless Chromium
#   make pictures    draw the pictures of docs/images anew, with that Chromium
#
# PYTHON=python3.12 picks the interpreter. PIP_TORCH picks where torch comes from: without a GPU,
#   make test PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"
# saves the download of the CUDA libraries.

PYTHON ?= python3
PIP_TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed
INTEGRATED := $(VENV)/.integrated

# One thread a process: the tests and the demo start several. Models are built from configs: nothing is downloaded.
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python
PYTEST := $(RUN) -m pytest -n 2

.PHONY: test slow test-integrations demo lint docs pictures browser clean
.DEFAULT_GOAL := test

test: $(INSTALLED)
	$(PYTEST)

slow: $(INSTALLED)
	$(PYTEST) -m slow

test-integrations: $(INTEGRATED)
	$(RUN) -m pytest -m integrations tests/integrations

demo: $(INSTALLED)
	$(RUN) -m torch.distributed.run --nproc-per-node=4 examples/train.py --plan dp=2,tp=2,zero=3 --check

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pictures: $(INSTALLED)
	$(RUN) docs/pictures.py

browser: $(INSTALLED)
	$(RUN) -m pytest -m browser tests/report

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.docs: $(INSTALLED)
	$(PIP) mkdocs mkdocs-material "mkdocstrings[python]" mkdocstrings-python
	touch $@

# torch comes first, so that nothing that follows chooses another build of it, and without its dependencies: the index of
# PIP_TORCH may lack the versions of them that constraints.txt asks for; the line after it brings them from the usual one.
# timm comes without dependencies for the first reason. torchvision, which timm imports, has no build for a CPU torch: it
# lies in a folder of its own, where transformers does not find it, and the one test that needs it registers stand-ins for
# its compiled operators.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("fxpar needs Python 3.11 or newer; $(PYTHON) is %d.%d: make PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps $(PIP_TORCH) torch
	$(PIP) torch setuptools numpy rich safetensors transformers pytest pytest-xdist hypothesis ruff mypy
	$(PIP) huggingface_hub PyYAML pillow
	$(PIP) --no-deps timm
	$(PIP) --no-deps --upgrade --target $(VENV)/vision torchvision
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# Without dependencies: what transformers brought has them but for those named, and none can bring another build of torch.
$(INTEGRATED): $(INSTALLED)
	$(PIP) --no-deps accelerate peft torchdata lightning-fabric lightning-utilities psutil
	touch $@
