# Every target sets itself up. Variables: PYTHON (>= 3.11), VENV (where), TORCH=cpu|cuda (which build).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP = $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input

TORCH_PIN := $(shell grep '^torch==' requirements/torch.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
ifneq ($(filter-out cpu cuda,$(TORCH)),)
$(error TORCH is '$(TORCH)'; say TORCH=cpu or TORCH=cuda)
endif
# Only Linux has two builds; elsewhere the index's default build is the one there is.
TORCH_BUILD := $(if $(filter Linux,$(shell uname -s)),$(TORCH),default)

# Nothing goes home and nothing is installed behind the lock's back.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
unexport PYTHONPATH

.PHONY: help demo test check bench lock clean

help:
	@echo "make demo    a federated study over phantom hospitals on this machine"
	@echo "make test    lint, types, import rules and all tests"
	@echo "make check   lint, types and import rules only"
	@echo "make bench   how fast the meta-learning engine is here"
	@echo "make lock    pin again after a change of dependencies (LOCK_FLAGS=--upgrade moves all pins up)"
	@echo "make clean   remove the environment and the caches"

demo: $(READY)
	@$(BIN)/wardround-lab demo

# Three at once also on two cores: many tests wait for processes.
test: check
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m simulations.bench.engine

lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --extra simulation --extra pacs --extra tracking --extra export --extra sr --extra dev --quiet \
		--universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" \
		--constraint requirements/torch.txt --no-emit-package torch --excludes requirements/cuda.txt \
		--output-file requirements/lock.txt $(LOCK_FLAGS)

clean:
	@test ! -f $(VENV)/pyvenv.cfg || rm -rf $(VENV)
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

$(VENV): $(READY)

# The stamp comes last and goes first: a setup that broke off is built anew from nothing.
$(READY): pyproject.toml requirements/lock.txt requirements/torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "wardround needs Python 3.11 or newer, and '$(PYTHON)' is not one: say make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@test -f $@ || test ! -f $(VENV)/pyvenv.cfg || rm -rf $(VENV)
	@rm -f $@
	@echo "setup 1/5: environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup 2/5: locked packages, checked by hash"
	@$(PIP) install --no-deps --require-hashes -r requirements/lock.txt
	@echo "setup 3/5: $(TORCH_PIN), $(TORCH_BUILD) build"
ifeq ($(TORCH_BUILD),cpu)
	@$(PIP) install $(TORCH_PIN)+cpu 2>/dev/null || \
		$(PIP) install $(TORCH_PIN)+cpu --index-url $(TORCH_CPU_INDEX) || { \
		echo "the CPU build of torch is neither where pip looks nor at $(TORCH_CPU_INDEX):" \
			"point PIP_FIND_LINKS at a folder with its wheel, or say TORCH=cuda for the default build" >&2; \
		exit 1; }
else
	@$(PIP) install -r requirements/torch.txt
endif
	@echo "setup 4/5: wardround itself"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@echo "setup 5/5: do all the versions fit together?"
	@$(BIN)/python -m pip check >/dev/null || { $(BIN)/python -m pip check >&2; exit 1; }
	@touch $@
