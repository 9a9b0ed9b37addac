"""hkd_d2._C_cuda as setup.py builds it: it links, loads without a GPU and registers its kernels."""

import json
import os
import re
import subprocess
import sys

import pytest

from cuda_emulator import cuda_sources
from helpers.rules import rule

pytestmark = rule("The CUDA module loads without a GPU")

BUILD = """
import sys
sys.path.insert(0, ".")
import setup as ours
from setuptools import setup
modules = [m for m in ours.extensions() if m.name == "hkd_d2._C_cuda"]
setup(ext_modules=modules, cmdclass={"build_ext": ours.Build}, script_args=sys.argv[1:])
"""
LOAD = """
import importlib.util, json, sys
import torch
import hkd_d2._C
spec = importlib.util.spec_from_file_location("_C_cuda", sys.argv[1])
importlib.util.module_from_spec(spec)
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps([n for n in sys.argv[2:] if not has(f"hkd_d2::{n}", "CUDA")]))
"""


def test_the_module_builds_and_registers_its_kernels_without_a_gpu(tmp_path):
    torch = pytest.importorskip("torch")
    cuda_sources.nvcc()
    if torch.version.cuda is None:
        pytest.skip("needs a CUDA build of PyTorch")
    variables = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    place = ["build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    command = [sys.executable, "-c", BUILD, *place]
    cuda_sources.run(command, cwd=cuda_sources.ROOT, env=variables)
    (built,) = (tmp_path / "lib").rglob("_C_cuda*.so")
    registered = [
        name
        for source in cuda_sources.CSRC.rglob("*_cuda.cpp")
        for name in re.findall(r'm\.impl\("(\w+)"', source.read_text())
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, built, *registered],
        capture_output=True,
        text=True,
        cwd=cuda_sources.ROOT,
    )
    assert registered and done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
