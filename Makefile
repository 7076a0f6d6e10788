# Every target builds its own environment in .venv from nothing and leaves it alone once it is there.
#   make demo    prepare, pretrain, fine-tune, export and report on made-up subjects
#   make test    the tests that everybody runs; make test-all adds the long ones; make lint; make wheel
#   make docs    the site of docs/, into site/
# PYTHON chooses the interpreter, PIP_OPTIONS goes to every `pip install`.

PYTHON ?= python3
PIP_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_OPTIONS) --constraint constraints.txt
# nvcc compiles for this machine's GPU, and for none where there is none: the tests see to the others. Wheels hold all.
ARCHITECTURE := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
NATIVE := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.inl csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

# Two processes on two cores; their threads wait asleep, or each would keep the other's core busy by waiting.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint format wheel docs clean

demo: $(VENV)/.built
	$(BIN)/voxtrast demo --output runs/demo

test: $(VENV)/.built
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.built
	$(PYTEST)

lint: $(VENV)/.built .typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy --namespace-packages --explicit-package-bases -p voxtrast

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.built
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

docs: $(VENV)/.built
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .typing site build dist *.egg-info kernels/*.so

# torch comes first and alone: the build needs it, and what follows must find it there (see constraints.txt).
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja
	@touch $@

# Our own package is built in this environment: an isolated build would fetch another torch.
$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(if $(ARCHITECTURE),VOXTRAST_CUDA_ARCHITECTURES=$(ARCHITECTURE),VOXTRAST_CUDA=0) \
	    $(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

# The type checker follows paths, and the package is a namespace over folders: it gets the namespace as links.
.typing:
	mkdir -p .typing/voxtrast
	for folder in kernels methods engine benchmarks; do ln -sfn "$(CURDIR)/$$folder" .typing/voxtrast/$$folder; done
