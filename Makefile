# Every command of the project. They share one environment, .venv at the root, made on first use.

BIN := .venv/bin
PY := $(BIN)/python
READY := .venv/.ready
BUILT := .venv/.built
SCALE ?= half

# Tests run in a process a core; JOBS=0 runs them in one, where --pdb works. The tests of a file stay
# together, with its fixtures, and files start in their order: those that compile are among the first.
JOBS ?= auto
PYTEST = $(PY) -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder

.PHONY: help quickstart methods pretraining build check test test-fast test-slow test-random \
	test-oldest sanitize bench gpu-check lint docs clean

help:
	@echo "make quickstart         train and compare teacher, plain and distilled student on a CPU"
	@echo "make quickstart SEEDS=0,1,2   the same with three students of each kind"
	@echo "make methods            train and compare every distillation method, three seeds each"
	@echo "make methods METHODS=fgfi,pkd SEEDS=0   some of them"
	@echo "make pretraining        train and compare the ways to pre-train a backbone, three seeds each"
	@echo "make build              compile what changed in csrc/; other targets do it by themselves"
	@echo "make test-fast          the tests without what trains, exports or compiles: while working"
	@echo "make test               the test suite"
	@echo "make check              lint and test: before a commit, and in continuous integration"
	@echo "make test-slow          the tests that take minutes: installation, recipes"
	@echo "make test-random        the suite in random order, with one thread and with two"
	@echo "make test-random TESTS='tests/data' SEED=7   some of it, as it was with that seed"
	@echo "make test-oldest        tests/ops on PyTorch 2.11 and Python 3.12, with no other package"
	@echo "make sanitize           tests of what is compiled under AddressSanitizer and UBSan"
	@echo "make bench              time the operators on this machine's CPU, at half of 1024x2048"
	@echo "make bench SCALE=full   the same at 1024x2048"
	@echo "make gpu-check          test and time the CUDA kernels on this machine's GPU, with a report"
	@echo "make lint               ruff, clang-format, rules of imports, types, shellcheck"
	@echo "make docs               the documents as a site, docs/_build/html"
	@echo "make clean              remove what was built, not what was trained"

$(READY): setup.py pyproject.toml tools/bootstrap.sh tools/install_detectron2.sh
	tools/bootstrap.sh
	@touch $(READY)

# Ninja compiles the files that changed and those that include them.
$(BUILT): $(READY) $(shell find csrc -type f)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $(BUILT)

build: $(BUILT)

quickstart: $(BUILT)
	$(PY) tools/quickstart.py $(if $(SEEDS),--seeds $(SEEDS))

methods: $(BUILT)
	$(PY) -m experiments.compare_methods $(if $(METHODS),--methods $(METHODS)) $(if $(SEEDS),--seeds $(SEEDS))

pretraining: $(BUILT)
	$(PY) -m experiments.compare_pretraining

check: lint test

test: $(BUILT)
	$(PYTEST) -m "not slow"

test-fast: $(BUILT)
	$(PYTEST) -m "not slow and not long"

test-slow: $(BUILT)
	$(PY) -m pytest -m slow

test-random: $(BUILT)
	for threads in 1 2; do \
		OMP_NUM_THREADS=$$threads $(PYTEST) -p randomly $(if $(SEED),--randomly-seed=$(SEED)) \
			-m "not slow" $(TESTS) || exit 1; \
	done

test-oldest: $(BUILT)
	tools/test_oldest.sh

sanitize: $(BUILT)
	tools/sanitize.sh

bench: $(BUILT)
	$(PY) tools/benchmark_ops.py --scale $(SCALE)

gpu-check: $(BUILT)
	$(PY) -m benchmarks.gpu_check

lint: $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc tests/cuda_emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
		| xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/lint-imports --no-cache
	$(PY) -m mypy
	if [ -x $(BIN)/shellcheck ]; then $(BIN)/shellcheck .ci/run tools/*.sh; fi

docs: $(BUILT)
	$(PY) -W ignore -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf build *.egg-info hkd_d2/*.so $(READY) $(BUILT)
