# Every command of the project. They share one environment, .venv at the root, made on first use.

PY := .venv/bin/python
READY := .venv/.ready
SCALE ?= half

.PHONY: help quickstart methods pretraining test test-slow test-oldest sanitize bench gpu-check lint docs clean

help:
	@echo "make quickstart         train and compare teacher, plain and distilled student on a CPU"
	@echo "make quickstart SEEDS=0,1,2   the same with three students of each kind"
	@echo "make methods            train and compare every distillation method, three seeds each"
	@echo "make methods METHODS=fgfi,pkd SEEDS=0   some of them"
	@echo "make pretraining        train and compare the ways to pre-train a backbone, three seeds each"
	@echo "make test               the test suite"
	@echo "make test-slow          the tests that take minutes: installation, recipes"
	@echo "make test-oldest        tests/ops on PyTorch 2.11 and Python 3.12, with no other package"
	@echo "make sanitize           tests of what is compiled under AddressSanitizer and UBSan"
	@echo "make bench              time the operators on this machine's CPU, at half of 1024x2048"
	@echo "make bench SCALE=full   the same at 1024x2048"
	@echo "make gpu-check          test and time the CUDA kernels on this machine's GPU, with a report"
	@echo "make lint               ruff and clang-format"
	@echo "make docs               the documents as a site, docs/_build/html"
	@echo "make clean              remove what was built, not what was trained"

$(READY): setup.py pyproject.toml tools/bootstrap.sh tools/install_detectron2.sh $(shell find csrc -type f)
	tools/bootstrap.sh
	@touch $(READY)

quickstart: $(READY)
	$(PY) tools/quickstart.py $(if $(SEEDS),--seeds $(SEEDS))

methods: $(READY)
	$(PY) -m experiments.compare_methods $(if $(METHODS),--methods $(METHODS)) $(if $(SEEDS),--seeds $(SEEDS))

pretraining: $(READY)
	$(PY) -m experiments.compare_pretraining

test: $(READY)
	$(PY) -m pytest -m "not slow"

test-slow: $(READY)
	$(PY) -m pytest -m slow

test-oldest: $(READY)
	tools/test_oldest.sh

sanitize: $(READY)
	tools/sanitize.sh

bench: $(READY)
	$(PY) tools/benchmark_ops.py --scale $(SCALE)

gpu-check: $(READY)
	$(PY) -m benchmarks.gpu_check

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc tests/cuda_emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs .venv/bin/clang-format --dry-run -Werror

docs: $(READY)
	$(PY) -W ignore -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf build *.egg-info hkd_d2/*.so $(READY)
