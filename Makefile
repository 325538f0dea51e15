# `make test` and `make bench` need Python 3.10+ (with venv) and, for the compiled ops, a C++ compiler; they make the rest in .venv.
# A finished step leaves a stamp in .venv, so a second run repeats nothing, and a run that was stopped goes on where it stopped.

PYTHON     ?= python3
# The torch to install. pip takes it from where it is configured to look; a CPU build is enough.
TORCH      ?= torch==2.13.0
# Must belong to that torch; only the baselines of the benchmark import it.
TORCHVISION ?= torchvision==0.28.0
# For the tests of the Triton kernels, which need no GPU; TRITON= does without. A torch built for CUDA brings its own.
TRITON     ?= $(if $(filter Linux,$(shell uname -s)),triton==3.6.0)
JOBS       ?= 2
BENCH_ARGS ?=
PYTEST_ARGS ?=
BUGS_ARGS   ?=
GPU_ARGS    ?=
DEMO        ?= demo

BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
# pip's lines about what is there already are not progress.
QUIET  := | sed -u '/^Requirement already satisfied/d'
# Baselines and tests compare with these; their own pins contradict the torch above, so they come without their dependencies.
BASELINES := torchscale==0.3.0 fairscale==0.4.13 timm==1.0.31 $(TORCHVISION)
BUILD_TOOLS := 'setuptools>=77' wheel cmake ninja 'pybind11>=2.13'
NATIVE_SOURCES := $(shell find csrc) CMakeLists.txt setup.py setup_cuda.py
# Named after what was asked for, so that another TORCH=... is another step to do.
sum = $(shell printf '%s' "$(1)" | cksum | cut -d' ' -f1)
TORCH_STAMP := .venv/.stamp-torch-$(call sum,$(TORCH))
BASELINES_STAMP := .venv/.stamp-baselines-$(call sum,$(BASELINES) $(TRITON))

# With a compiler, sources that do not compile are an error; without one the package does without them.
export BEIT3_FAST_BUILD ?= $(if $(shell command -v $${CXX:-c++} || command -v g++ || command -v clang++),1,auto)

# A library that somebody deleted is built again; without a compiler there is none.
ifeq ($(BEIT3_FAST_BUILD)$(wildcard beit3_fast/libbeit3_fast_ops.so),1)
$(shell rm -f .venv/.stamp-native)
endif

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test test-full test-triton planted-bugs bench bench-baselines demo gpu lint format build clean distclean

help:
	@echo "make test        environment, then style, types and tests (a first run: a few minutes to install; then at most 10 minutes)"
	@echo "make bench       environment, then bench/run.py; BENCH_ARGS='--quick' for the short one, '--help' for the options"
	@echo "make bench-baselines  installs OpenVINO, NNCF and ONNX Runtime; then BENCH_ARGS='--runtimes ...' or '--full' compares with them"
	@echo "make gpu         on a machine with a GPU: parity, races, sanitizer, benchmark, one folder of results; GPU_ARGS='--device cpu --dry-run' without one"
	@echo "make demo        draws a small world, pretrains a tiny model on it, fine-tunes it, and writes DEMO/report.html"
	@echo "make test-full   the tests with the long matrices"
	@echo "make test-triton TRITON=3.9.0  the tests of the Triton kernels, interpreted and compiled, with that Triton in an environment of its own"
	@echo "make planted-bugs  bugs planted in a copy, one at a time: does the gate catch them? (hours; BUGS_ARGS='--list', '--only NAME ...')"
	@echo "make build       environment and compiled ops only"
	@echo "make lint        ruff and mypy;  make format  rewrites the files"
	@echo "make clean       removes what was built;  make distclean  removes the environments too"
	@echo "variables: PYTHON=$(PYTHON)  TORCH=$(TORCH)  JOBS=$(JOBS)  BENCH_ARGS  PYTEST_ARGS  BUGS_ARGS  GPU_ARGS"

test: lint
	@echo "== tests: pytest on $(JOBS) processes"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -p no:benchmark $(PYTEST_ARGS)

test-full: lint
	@echo "== tests, long matrices included: pytest on $(JOBS) processes"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -p no:benchmark -m "full or not full" $(PYTEST_ARGS)

# Another Triton than that of .venv. The kernels need torch, the tests no compiled op: nothing is built.
OTHER_TRITON := $(patsubst triton==%,%,$(TRITON))
OTHER        := .venv-triton-$(OTHER_TRITON)
TRITON_TESTS := tests/ops/test_triton_*.py tests/bench/test_kernel_resources.py
test-triton: $(OTHER)/.stamp
	@echo "== tests: $(TRITON_TESTS) with Triton $(OTHER_TRITON), in the interpreter, then compiled for sm_80, sm_90 and sm_100"
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(OTHER)/bin/python -m pytest -n $(JOBS) $(PYTEST_ARGS) $(TRITON_TESTS)

$(OTHER)/.stamp:
	@$(if $(OTHER_TRITON),,echo 'TRITON= names no version: make test-triton TRITON=3.9.0'; exit 1)
	@echo "== environment: $(OTHER) with $(TORCH) and Triton $(OTHER_TRITON) (a few minutes)"
	@$(PYTHON) -m venv $(OTHER)
	@$(OTHER)/bin/python -m pip --disable-pip-version-check --no-input install '$(TORCH)' numpy 'pytest>=8' pytest-timeout pytest-xdist hypothesis $(QUIET)
	@$(OTHER)/bin/python -m pip --disable-pip-version-check --no-input install --no-deps 'triton==$(OTHER_TRITON)' $(QUIET)
	@touch $@

planted-bugs: build
	@echo "== planted bugs: tests/planted_bugs.py $(BUGS_ARGS)"
	@$(BIN)/python tests/planted_bugs.py $(BUGS_ARGS)

bench: build
	@echo "== benchmark: bench/run.py $(BENCH_ARGS)"
	@$(BIN)/python bench/run.py $(BENCH_ARGS)

# Some 300 MB that only a comparison with all runtimes needs.
bench-baselines: build .venv/.stamp-bench-full
	@echo "== ready: make bench BENCH_ARGS=--full, or BENCH_ARGS='--runtimes beit3_fast torchscale openvino', and so on"

# A world to learn in, a tiny model that does, and what it is then good for; what is there is kept, so a run that was stopped
# goes on. A run takes one core: its figures do not depend on how many there are.
DEMO_RUNS := run contrastive vqa vqa_scratch retrieval retrieval_scratch
demo: build
	@echo "== demo in $(DEMO): the world, then $(DEMO_RUNS), $(JOBS) at a time"
	@$(BIN)/beit3-fast world $(DEMO)/world --scenes 20000 --labelled 4000 --pixels 48
	@cp examples/pretrain_world.toml examples/contrastive_world.toml examples/finetune_world_*.toml $(DEMO)/
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j $(JOBS) $(DEMO_RUNS:%=$(DEMO)/%/report.json)
	@$(BIN)/beit3-fast report $(DEMO_RUNS:%=$(DEMO)/%) --out $(DEMO)/report.html

demo_run = $(BIN)/beit3-fast $(1) --out $(DEMO)/$* 2>&1 | sed -u 's/^/$*: /'
$(DEMO)/run/report.json: $(DEMO)/%/report.json:
	@$(call demo_run,pretrain --config $(DEMO)/pretrain_world.toml)
$(DEMO)/contrastive/report.json: $(DEMO)/%/report.json:
	@$(call demo_run,finetune --config $(DEMO)/contrastive_world.toml)
$(DEMO)/vqa/report.json $(DEMO)/retrieval/report.json: $(DEMO)/%/report.json: | $(DEMO)/contrastive/report.json
	@$(call demo_run,finetune --config $(DEMO)/finetune_world_$*.toml)
$(DEMO)/vqa_scratch/report.json $(DEMO)/retrieval_scratch/report.json: $(DEMO)/%/report.json:
	@$(call demo_run,finetune --from-scratch --config $(DEMO)/finetune_world_$(*:_scratch=).toml)

gpu: build
	@echo "== on a GPU: bench/gpu.py $(GPU_ARGS)"
	@$(BIN)/python -m bench.gpu $(GPU_ARGS)

lint: build
	@echo "== style: ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== types: mypy"
	@$(BIN)/mypy

format: build
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

build: .venv/.stamp-native $(BASELINES_STAMP)
	@$(BIN)/python -c 'from beit3_fast.ops import library; print("== " + library.load().describe())'

.venv/.stamp-venv:
	@echo "== 1/6 environment: .venv with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; name another with PYTHON=...")'
	@$(PYTHON) -m venv .venv
	@touch $@

$(TORCH_STAMP): .venv/.stamp-venv
	@echo "== 2/6 $(TORCH) (about a minute; the download is some 200 MB, more for a CUDA build)"
	@$(PIP) install '$(TORCH)'
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  echo "   torch does not import (an earlier run was stopped while copying it?): once more"; \
	  $(PIP) install --ignore-installed --no-deps '$(TORCH)'; $(BIN)/python -c 'import torch'; }
	@rm -f .venv/.stamp-torch-*
	@touch $@

.venv/.stamp-tools: $(TORCH_STAMP)
	@echo "== 3/6 build tools"
	@$(PIP) install $(BUILD_TOOLS) $(QUIET)
	@touch $@

.venv/.stamp-native: .venv/.stamp-tools $(NATIVE_SOURCES)
	@echo "== 4/6 compiled ops (about a minute; without a C++ compiler this says so and goes on)"
	@$(BIN)/python setup.py build_ext --inplace
	@touch $@

.venv/.stamp-package: .venv/.stamp-tools pyproject.toml | .venv/.stamp-native
	@echo "== 5/6 the package in place, and what tests and benchmark import (about a minute)"
	@$(PIP) install --no-build-isolation -e '.[dev,bench]' $(QUIET)
	@touch $@

# Last, because pip complains about their pins whenever it installs something that they depend on.
$(BASELINES_STAMP): .venv/.stamp-package
	@echo "== 6/6 $(BASELINES) $(TRITON), without their dependencies"
	@$(PIP) install --no-deps $(BASELINES) $(QUIET)
	@$(if $(TRITON),$(BIN)/python -c 'import torch; assert torch.version.cuda; import triton' 2>/dev/null || $(PIP) install --no-deps $(TRITON) $(QUIET),true)
	@rm -f .venv/.stamp-baselines-*
	@touch $@

.venv/.stamp-bench-full: pyproject.toml $(BASELINES_STAMP)
	@echo "== OpenVINO, NNCF and ONNX Runtime (about a minute)"
	@$(PIP) install 'beit3-fast[bench-full]' $(QUIET)
	@touch $@

clean:
	rm -rf build dist *.egg-info beit3_fast/*.so beit3_fast/_build.json .venv/.stamp-native .venv/.stamp-package
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find beit3_fast bench tests kernels -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-triton-*
