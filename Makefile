# Two commands on a fresh machine with Python, gcc and make: `make demo` and `make test`. Neither needs root.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Byte code is kept, whatever the environment says: else each of thousands of processes compiles what it imports.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal
# Whatever starts no engine and no downloader: rules, properties, and each port's contract for its memory twin and its adapter.
FAST := tests/unit tests/laws tests/contract
ONE_REAL_PATH := tests/functional/test_main_job.py::test_a_model_is_downloaded_verified_tested_and_served

.PHONY: demo test test-fast test-pythons format release check docs reference man install-check fuzz crash bench bench-table gpu-check container lock-requirements clean

demo: $(READY)
	$(BIN)/reconcile demo

# Everything, side by side: about eight minutes on two cores.
test: $(READY)
	$(PYTEST)

# Under a minute: FAST and one real path from end to end. Left out are the tests marked slow, and the folders adversary, crash and functional.
test-fast: $(READY)
	RECONCILE_FUZZ=5000 $(PYTEST) -q -m "not slow" $(FAST) $(ONE_REAL_PATH)

# FAST on each other supported Python that is installed here, without llama-cpp-python, which would be compiled anew for each.
test-pythons: requirements.lock
	@RECONCILE_FUZZ=5000 sh .ci/pythons.sh -q -n auto -m "not slow" $(FAST)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Each install line of README and documentation, typed in an environment of its own: about ten minutes, with a network or wheels at hand.
install-check: $(READY)
	$(BIN)/python -m tests.install_check

# What CI runs beside the tests: types, style, the direction of imports, and that the committed lock is what its snapshot compiles to.
check: $(READY)
	$(BIN)/mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/lint-imports
	$(BIN)/reconcile lock --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The documentation as a site, in build/site. A link that leads nowhere is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The reference pages of the documentation, from the code. A test compares them.
reference: $(READY)
	$(BIN)/python -m tests.reference_pages

# The manual pages in docs/man, from the help of the commands. A test compares them, and a wheel installs them.
man: $(READY)
	$(BIN)/python -m reconciler.cli.man_pages docs/man

# The next release in dist/, with its notes; publishes nothing.
release: $(READY)
	@sh .ci/release.sh $(BIN)/python

# A million mutated envelopes; `make test` tries twenty thousand.
fuzz: $(READY)
	RECONCILE_FUZZ=1000000 $(BIN)/python -m pytest tests/laws/test_trust_laws.py -k mutat

# Kill, cut, stop and refuse at every step, not at some: about twenty minutes.
crash: $(READY)
	$(BIN)/python -m tests.crash.exhaustive

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only -o addopts="" -o python_files="bench_*.py"

# Every ratio beside its peer, measured anew: benchmarks/ratios.json, and the table in benchmarks/RESULTS.md. About ten minutes; needs nginx,
# curl and openssl. KEEP=1 makes it the baseline, with which `make test` compares it.
bench-table: $(READY)
	$(BIN)/python -m benchmarks.table $(if $(KEEP),--keep)

# The image of deploy/Containerfile, built with podman (PODMAN_OPTIONS are for podman, BUILD_OPTIONS for the build), and run by its tests:
# from a signed snapshot to an active model, the probes, SIGTERM in a download and in a test job.
container: $(READY)
	podman $(PODMAN_OPTIONS) build $(BUILD_OPTIONS) -f deploy/Containerfile -t reconcile-check .
	RECONCILE_IMAGE=localhost/reconcile-check RECONCILE_CONTAINER_OPTIONS="$(PODMAN_OPTIONS)" $(BIN)/python -m pytest tests/functional/test_container.py

# What a bare machine with an NVIDIA GPU needs for the check, in build/gpu: docs/gpu.md. ARCH=sm_89; THERE=1 lets that machine build the backend.
gpu-bundle: $(READY)
	$(BIN)/python -m benchmarks.gpu_bundle $(ARCH) $(if $(THERE),--there)

# On a machine with an NVIDIA GPU: shows that test jobs run on it inside the sandbox. Fails where there is none. With BUNDLE nothing else is needed
# than Python 3.12; without it, an environment whose llama-cpp-python was built with CUDA.
gpu-check: $(if $(BUNDLE),,$(READY))
	$(if $(BUNDLE),sh benchmarks/gpu_check.sh "$(BUNDLE)" "$(or $(OUT),gpu-check-results)",$(BIN)/python -m benchmarks.gpu_check --out "$(or $(OUT),gpu-check-results)")

$(READY): requirements.lock pyproject.toml
	@sh .ci/setup.sh "$(PYTHON)" "$(VENV)"
	@touch $@

# After a change of dependencies: pins with hashes, and no index named in them.
lock-requirements: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --generate-hashes --no-header --python-version 3.11 \
	  --upgrade --quiet -o requirements.lock

clean:
	rm -rf $(VENV) $(VENV)-3.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
