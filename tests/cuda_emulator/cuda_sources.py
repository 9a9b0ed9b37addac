"""The CUDA sources for tests: where they are, and how g++ and nvcc compile them without a GPU."""

import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "cuda_emulator" / "emulator"
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# Compilers that run at a time; each takes about 1 GB.
JOBS = min(4, os.cpu_count() or 1)


def run(command, **options):
    """Run a command that must succeed and return what it printed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def run_all(commands):
    """Run independent commands, a few at a time, and return what each printed."""
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(run, commands))


def kernels():
    """The .cu files."""
    return sorted(CSRC.rglob("*.cu"))


# ------------------------------------------------------------------------------------- emulation
def cuda_include():
    """The folder of CUDA's headers: of a toolkit, or of the packages that PyTorch's wheel needs."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).parents[1], "/usr/local/cuda"]
    wheels = (SITE_PACKAGES / "nvidia").glob("cu*")
    for home in (*homes, *sorted(wheels, reverse=True)):
        if home and Path(home, "include", "cuda_fp16.h").exists():
            return Path(home, "include")
    pytest.skip("needs CUDA's headers (cuda_fp16.h), of a toolkit or of a CUDA build of PyTorch")


def emulated(*flags):
    """The command that compiles .cu files as C++ for the emulator; append files and ``-o``."""
    return [
        *("g++", "-std=c++17", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", *flags),
        *("-DHKD_EMULATE_CUDA", "-DHKD_ROI_ROWS_BYTES=40000"),
        *(f"-I{folder}" for folder in (EMULATOR, CSRC, CSRC / "include")),
        *("-isystem", str(cuda_include()), "-x", "c++"),
    ]


@functools.cache
def emulated_operators(sanitize=False, replace=()):
    """Build the library that registers the emulated kernels in place of the CPU kernels.

    Args:
        sanitize (bool): with ASan and UBSan.
        replace (tuple): ``(file, old, new)``: a mutation, of text that occurs in the file once.

    Returns:
        Path: the shared library. One that was built from the same sources is used again.
    """
    import torch

    sources = [*kernels(), *sorted(CSRC.rglob("*_cuda.cpp")), EMULATOR / "library.cpp"]
    headers = [p for p in (*CSRC.rglob("*.*h"), *EMULATOR.glob("*.h")) if p.is_file()]
    flags = ["-O1", "-DTORCH_TARGET_VERSION=0x020b000000000000", *(SANITIZE if sanitize else ())]
    torch_folder = Path(torch.__file__).parent
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)

    def text_of(path):
        text = path.read_text()
        if replace and path == replace[0]:
            assert text.count(replace[1]) == 1, f"{path} does not have {replace[1]!r} once"
            text = text.replace(*replace[1:])
        return text

    if replace and replace[0] in headers:
        # Found before the header itself, which every source may include.
        mutated = folder / f"mutated-{hashlib.sha256(str(replace).encode()).hexdigest()[:16]}"
        copy = mutated / replace[0].relative_to(CSRC)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text_of(replace[0]))
        flags.append(f"-I{mutated}")
    command = [*emulated(*flags), "-isystem", torch_folder / "include"]
    known = hashlib.sha256(str(command).encode() + torch.__version__.encode())
    for header in sorted(headers):
        known.update(text_of(header).encode())

    objects, missing = [], []
    for source in sources:
        text = text_of(source)
        digest = known.copy()
        digest.update(f"{source}\n{text}".encode())
        made = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        objects.append(made)
        if not made.exists():
            copy = made.with_suffix(".mutated" + source.suffix)
            if replace and source == replace[0]:
                copy.write_text(text)
                source = copy
            missing.append(([*command, "-c", source, "-o", f"{made}.part"], made))
    run_all([compiling for compiling, _ in missing])
    for _, made in missing:
        Path(f"{made}.part").rename(made)
    name = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = folder / f"operators-{name}.so"
    if not library.exists():
        run(
            [
                *("g++", "-shared", *(SANITIZE if sanitize else ()), *objects),
                *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
                *(f"-Wl,-rpath,{torch_folder / 'lib'}", "-o", f"{library}.part"),
            ]
        )
        Path(f"{library}.part").rename(library)
    return library


# ----------------------------------------------------------------------------------------- nvcc
def nvcc():
    """The CUDA compiler."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return found or pytest.skip("needs nvcc")


def binary_tool(name):
    """``cuobjdump`` or ``nvdisasm``: of a toolkit, of PyPI's packages or of Triton's."""
    folders = [
        *(SITE_PACKAGES / "nvidia").glob("cu*/bin"),
        SITE_PACKAGES / "triton" / "backends" / "nvidia" / "bin",
        "/usr/local/cuda/bin",
    ]
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))
    return found or pytest.skip(f"needs {name}: pip install nvidia-cuda-{name}")
