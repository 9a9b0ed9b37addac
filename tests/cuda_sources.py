"""The CUDA sources for tests: where they are, and how g++ and nvcc compile them without a GPU."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "csrc" / "emulator"
SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def cuda_include():
    """The folder of CUDA's headers: of a toolkit, or of the packages that PyTorch's wheel needs."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).parents[1], "/usr/local/cuda"]
    wheels = Path(sysconfig.get_paths()["purelib"], "nvidia").glob("cu*")
    for home in (*homes, *sorted(wheels, reverse=True)):
        if home and Path(home, "include", "cuda_fp16.h").exists():
            return Path(home, "include")
    pytest.skip("needs CUDA's headers (cuda_fp16.h), of a toolkit or of a CUDA build of PyTorch")


def emulated(*flags):
    """The command that compiles .cu files as C++ for the emulator; append files and ``-o``."""
    return [
        *("g++", "-std=c++17", "-Wall", "-Werror", "-DHKD_EMULATE_CUDA", *flags),
        *(f"-I{folder}" for folder in (EMULATOR, ROOT / "csrc", ROOT / "csrc" / "include")),
        *("-isystem", str(cuda_include()), "-x", "c++"),
    ]


def run(command, **options):
    """Run a command that must succeed and return what it printed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
