"""Builds what is compiled, csrc/. Everything else is in pyproject.toml.

hkd_d2._C        operators, CPU kernels: LibTorch's stable ABI, PyTorch 2.11 and newer
hkd_d2._C_cuda   operators, CUDA kernels: *.cu, *_cuda.cpp and cuda_module.cpp
hkd_d2._native   what is not a tensor operator, by pybind11: needs no PyTorch

    pip install --no-build-isolation -e .    with PyTorch already in the environment
    python setup.py build_ext --inplace      compiles again what changed

DEBUG=1          warnings are errors, with debug symbols
SANITIZE=1       under AddressSanitizer and UndefinedBehaviorSanitizer (tools/sanitize.sh)
FORCE_CUDA=1     CUDA kernels, without a GPU too; HKD_NO_CUDA=1 none, with a GPU too
TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, MAX_JOBS    as in every PyTorch extension
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

try:
    import torch
except ImportError:
    # pip builds in an environment of its own, which cannot know which of the PyTorch builds (CPU,
    # CUDA) is yours; the one in the environment that is installed into is the right one.
    site.addsitedir(sysconfig.get_paths()["purelib"])
    try:
        import torch
    except ImportError:
        sys.exit(
            "hkd_d2 is compiled against PyTorch, which this environment lacks; install it first: "
            "pip install torch torchvision"
        )
try:
    import pybind11
except ImportError:
    sys.exit("Building hkd_d2 needs pybind11, which is missing; install it: pip install pybind11")


def find_cuda():
    """The folder of a CUDA toolkit: the system's, or that of PyPI's packages; None without one."""
    nvcc = shutil.which("nvcc")
    wheels = Path(sysconfig.get_paths()["purelib"], "nvidia").glob("cu*")
    folders = [nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda", *sorted(wheels)[::-1]]
    # An nvcc on the path may be a script that calls one elsewhere.
    needed = ("bin/nvcc", "include/cuda_runtime_api.h")
    found = (str(f) for f in folders if f and all(Path(f, file).exists() for file in needed))
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or next(found, None)


if toolkit := find_cuda():
    os.environ["CUDA_HOME"] = toolkit  # where the next line's import finds it
from torch.utils.cpp_extension import (  # noqa: E402
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
)

DEBUG = os.environ.get("DEBUG") == "1"
SANITIZE = os.environ.get("SANITIZE") == "1"
# A float that does not fit an integer, such as a NaN coordinate, is not part of "undefined".
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
FLAGS = [
    "-std=c++17",
    "-Wall",
    # Vectors wider than the baseline's are passed to functions that are inlined only.
    "-Wno-psabi",
    "-g0",  # Python's own flags ask for symbols, which would be most of the module's size
    # What keeps a loop from being vectorised without changing what it computes.
    "-fno-math-errno",
    "-fno-trapping-math",
    *(["-g", "-Werror"] if DEBUG else []),
    *(["-O1", "-g", "-fno-wrapv", *SANITIZERS] if SANITIZE else ["-O3"]),
]
# PyTorch's build takes the conversions and operators of half precision away.
HALF = ["HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS"]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "--threads=2"),
    *(f"-U__CUDA_NO_{name}__" for name in HALF),
    *(["-lineinfo", "-Werror", "all-warnings"] if DEBUG else []),
]
LINK_FLAGS = SANITIZERS if SANITIZE else []
INCLUDE = [os.path.abspath("csrc"), os.path.abspath("csrc/include")]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
SOURCES = {str(path) for path in Path("csrc").rglob("*.cpp")}
NATIVE = {"csrc/native.cpp", *(str(path) for path in Path("csrc/evaluation").glob("*.cpp"))}
KERNELS = {str(path) for path in Path("csrc").rglob("*.cu")}
CUDA = {path for path in SOURCES if path.endswith("_cuda.cpp")} | {"csrc/cuda_module.cpp"} | KERNELS


def cuda_toolkit():
    """Return (major, minor) of the CUDA toolkit to build with; None builds CPU kernels alone."""
    forced = os.environ.get("FORCE_CUDA") == "1"
    if os.environ.get("HKD_NO_CUDA") == "1" or not (forced or torch.cuda.is_available()):
        return None
    nvcc = os.path.join(CUDA_HOME or "", "bin", "nvcc")
    lack = None
    if torch.version.cuda is None:
        lack = f"PyTorch {torch.__version__} is built without CUDA: install a CUDA build of it"
    elif not os.path.exists(nvcc):
        lack = f"there is no nvcc: set CUDA_HOME to a CUDA {torch.version.cuda} toolkit"
    if lack and forced:
        sys.exit(f"FORCE_CUDA=1, but {lack}, or unset FORCE_CUDA to build the CPU kernels alone.")
    if lack:
        print(f"hkd_d2: a GPU, but the CPU kernels alone are built; {lack}.")
        return None
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    major, minor = (int(n) for n in re.search(r"release (\d+)\.(\d+)", report).groups())
    if major != int(torch.version.cuda.split(".")[0]):
        sys.exit(
            f"{nvcc} is of CUDA {major}.{minor}, PyTorch {torch.__version__} of CUDA "
            f"{torch.version.cuda}; set CUDA_HOME to a toolkit of the same major version, or "
            "HKD_NO_CUDA=1 to build the CPU kernels alone."
        )
    return major, minor


def operators(flags, *macros):
    """Options of a module of operators, new lists each time: PyTorch's build adds to them."""
    return {
        "depends": HEADERS,
        "include_dirs": [*INCLUDE],
        # The oldest PyTorch that the operators run with: 2.11.
        "define_macros": [("TORCH_TARGET_VERSION", "0x020b000000000000"), *macros],
        "extra_compile_args": flags,
        "extra_link_args": [*LINK_FLAGS],
        "py_limited_api": True,
    }


def extensions():
    """The modules to build here."""
    facts = {"TORCH": torch.__version__, "FLAGS": " ".join(FLAGS)}
    modules = [CppExtension("hkd_d2._C", sorted(SOURCES - NATIVE - CUDA), **operators([*FLAGS]))]
    if toolkit := cuda_toolkit():
        # Toolkits before 12.8 do not know Blackwell.
        newest = "9.0;10.0;12.0+PTX" if toolkit >= (12, 8) else "9.0+PTX"
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;{newest}")
        facts |= {"CUDA": "{}.{}".format(*toolkit), "CUDA_ARCHITECTURES": architectures}
        flags = {"cxx": [*FLAGS], "nvcc": [*NVCC_FLAGS]}
        cuda = CUDAExtension("hkd_d2._C_cuda", sorted(CUDA), **operators(flags, ("USE_CUDA", None)))
        # PyPI's packages have no libcudart.so to link with.
        cuda.libraries = [{"cudart": "cudart_static"}.get(n, n) for n in cuda.libraries]
        cuda.library_dirs += [f"{CUDA_HOME}/lib64", f"{CUDA_HOME}/lib"]
        modules.append(cuda)
    native = Extension(
        "hkd_d2._native",
        sorted(NATIVE),
        language="c++",
        depends=HEADERS,
        include_dirs=[*INCLUDE, pybind11.get_include()],
        define_macros=[(f"HKD_BUILD_{name}", f'"{value}"') for name, value in facts.items()],
        # No multiply and add in one rounding, which would not be NumPy's result.
        extra_compile_args=[*FLAGS, "-fvisibility=hidden", "-ffp-contract=off"],
        extra_link_args=[*LINK_FLAGS],
    )
    return [*modules, native]


class Build(BuildExtension):
    """PyTorch's build, which says first what it lacks, and keeps what it compiled."""

    def finalize_options(self):
        super().finalize_options()
        if self.editable_mode:
            # setuptools compiles in a temporary folder here. In the usual one, the next
            # `setup.py build_ext --inplace` finds the objects and compiles what changed alone.
            name = f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = os.path.join("build", name)

    def build_extensions(self):
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(
                f"Building hkd_d2 needs a C++17 compiler, and there is no {compiler}; install one "
                "(Debian: apt-get install g++), or name yours in CXX."
            )
        super().build_extensions()


class Files(build_py):
    """The package's files, and configs/ as hkd_d2/configs. An editable install reads configs/."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "hkd_d2", "configs")
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree("configs", target)


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "build_py": Files})
