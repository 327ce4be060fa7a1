# The whole loop of work; README explains each command, CI runs the same ones.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OUTPUT ?= outputs/demo
FLOOR  := .venv-floor

.PHONY: venv check test slow floor faults demo bench gpu gpu-cache clean

venv: $(READY)

# --no-build-isolation: the build needs nothing but the pinned setuptools, so none is fetched a second time.
$(READY): pyproject.toml setup.py constraints.txt
	@echo "installing into $(VENV): two to five minutes, 2.5 GB with a CPU build of torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --editable ".[dev]"
	touch $(READY)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/hdpissa
	cd $(VENV)/src && MYPYPATH=. ../bin/mypy --config-file ../../pyproject.toml \
		-p hdpissa.engine -p hdpissa.kernels -p hdpissa.launch -p hdpissa.benchmarks

# Two files at a time: most tests use one core, or wait for ranks.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests

# What a shorter test stands for in `make test`: all kernels for all chips, the long form of launches and refusals.
slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests

# The trainers at the oldest versions that pyproject.toml allows, in an environment of their own.
floor: $(FLOOR)/.ready
	$(FLOOR)/bin/python -m pytest -m "not slow" tests/trainers/test_trainers.py

$(FLOOR)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(FLOOR)
	grep -vE "^(transformers|huggingface_hub|accelerate|trl)==" constraints.txt > $(FLOOR)/constraints.txt
	printf '%s\n' "transformers==5.17.*" "accelerate==1.13.*" "trl==1.12.*" >> $(FLOOR)/constraints.txt
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(FLOOR)/constraints.txt setuptools
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(FLOOR)/constraints.txt \
		--no-build-isolation --editable . pytest
	touch $(FLOOR)/.ready

# The long form of the fault tests: hangs and deaths at every point, and sixty runs killed and resumed. RUNS=300 for more.
faults: $(READY)
	FAULTS=long $(BIN)/python -m pytest tests/faults/test_faults.py tests/checkpoints/test_resume.py tests/checkpoints/test_crash_states.py tests/checkpoints/test_storage.py
	$(BIN)/python tests/kill_runs.py --runs $(or $(RUNS),60)

# Two ranks, two slices: real launcher, real model, CPU. Any machine with Python 3.11 or newer.
demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" OUTPUT="$(OUTPUT)" sh launch/demo.sh

# Every benchmark that needs no GPU, in a small form: about ten minutes on two cores, one table in the end.
bench: $(READY)
	$(BIN)/python benchmarks/suite.py

# Needs a GPU; on a bare machine no virtual environment either (benchmarks/README.md). PHASES="smoke tests" runs a part,
# DRY=1 all of it on the CPU with toy sizes.
gpu:
	$(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) benchmarks/gpu/run.py $(if $(DRY),--dry) $(PHASES)

# Kernels compiled ahead for `make gpu` on a machine whose Python is GPU_PYTHON; needs no GPU.
gpu-cache: $(READY)
	$(BIN)/python benchmarks/gpu/gpu_cache.py --python $(or $(GPU_PYTHON),3.12)

clean:
	rm -rf $(VENV) $(FLOOR) outputs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
