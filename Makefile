# make demo    verify three shipped networks   make test    what CI runs: lint, types, tests
# make lint    ruff and mypy only              make clean   remove the virtual environment and caches
# make gpu     on a machine with an NVIDIA GPU: the tests marked `gpu` and all measurements, results in OUT, ten minutes

VENV := .venv
BIN := $(VENV)/bin
COMMAND := $(VENV)/.installed
TOOLS := $(VENV)/.tools
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTHON ?=
# `make gpu` makes no virtual environment: CuPy has to fit the machine's CUDA, so the Python that is active brings it.
GPU_PYTHON = PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(or $(PYTHON),python3)
OUT ?= benchmarks/results
GPU_OPTIONS ?=
export ORT_DISABLE_TELEMETRY ?= 1
DEMO_UNSAT := specs/examples/onnx/mnist_mlp_qop.onnx specs/examples/vnnlib/mnist_0_eps_2.vnnlib
DEMO_CERTIFIED := specs/certified/onnx/mnist.onnx specs/certified/vnnlib/mnist_0_eps_4.vnnlib.gz
DEMO_SAT := specs/examples/onnx/tiny_mlp_qop.onnx specs/examples/vnnlib/tiny_unsafe.vnnlib

.PHONY: demo test check lint gpu clean
.DEFAULT_GOAL := demo

# Remade whenever a pin or the package's metadata changes; --clear, since an old interpreter may have made it.
$(COMMAND): requirements.txt pyproject.toml
	@python=$$(for p in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	    if $$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo $$p; break; fi; done); \
	if [ -z "$$python" ]; then \
	    echo "qverify needs Python 3.11 or newer with its venv module (on Debian and Ubuntu: python3-venv)." >&2; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	echo "Making $(VENV) with $$($$python --version)"; \
	$$python -m venv --clear $(VENV)
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# What developers and CI need besides, PyTorch among it.
$(TOOLS): requirements-dev.txt $(COMMAND)
	@$(PIP) -r requirements-dev.txt
	@touch $@

# $(1): arguments of qverify, $(2): the exit code that this verdict has
define show
	@echo; echo "$$ qverify $(1)"; $(BIN)/qverify $(1); code=$$?; \
	    [ $$code -eq $(2) ] || { echo "make demo: exit code $$code, expected $(2)" >&2; exit 1; }
endef

demo: $(COMMAND)
	$(call show,$(DEMO_UNSAT),0)
	$(call show,$(DEMO_CERTIFIED),0)
	$(call show,$(DEMO_SAT),1)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2

check: test

gpu:
	@$(GPU_PYTHON) benchmarks/gpu/run.py --out "$(OUT)" $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
