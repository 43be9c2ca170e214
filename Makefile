# Two commands on a fresh machine with Python, gcc and make: `make demo` and `make test`. Neither needs root.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check fuzz crash bench gpu-check lock-requirements clean

demo: $(READY)
	$(BIN)/reconcile demo

test: $(READY)
	$(BIN)/python -m pytest

# What CI runs beside the tests: types, style, the direction of imports, and that the committed lock is what its snapshot compiles to.
check: $(READY)
	$(BIN)/mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/lint-imports
	$(BIN)/reconcile lock --check

fuzz: $(READY)
	RECONCILE_FUZZ=1000000 $(BIN)/python -m pytest tests/laws/test_trust_laws.py -k mutat

# Kill, cut, stop and refuse at every step, not at some: about twenty minutes.
crash: $(READY)
	$(BIN)/python -m tests.crash.exhaustive

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only -o addopts="" -o python_files="bench_*.py"

# On a machine with an NVIDIA GPU, nvcc and a sandbox: shows that a test job runs on the GPU inside it. Fails where there is none.
gpu-check: $(READY)
	$(BIN)/python -m benchmarks.gpu_check

$(READY): requirements.lock pyproject.toml
	@sh .ci/setup.sh "$(PYTHON)" "$(VENV)"
	@touch $@

# After a change of dependencies: pins with hashes, and no index named in them.
lock-requirements: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --generate-hashes --no-header --python-version 3.11 \
	  --upgrade --quiet -o requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
