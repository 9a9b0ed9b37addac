"""Builds the compiled operators, csrc/, into hkd_d2._C. Everything else is in pyproject.toml.

pip install -e .            with PyTorch already in the environment
DEBUG=1 pip install -e .    warnings are errors, with debug symbols
"""

import os
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch  # noqa: F401
except ImportError:
    # pip builds in an environment of its own, which cannot know which of the PyTorch builds (CPU,
    # CUDA) is yours; the one in the environment that is installed into is the right one.
    site.addsitedir(sysconfig.get_paths()["purelib"])
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit(
            "hkd_d2 is compiled against PyTorch, which this environment lacks; install it first: "
            "pip install torch torchvision"
        )

from torch.utils.cpp_extension import BuildExtension, CppExtension

debug = os.environ.get("DEBUG", "0") == "1"

setup(
    ext_modules=[
        CppExtension(
            "hkd_d2._C",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            include_dirs=[os.path.abspath("csrc"), os.path.abspath("csrc/include")],
            # The oldest PyTorch that the module runs with: 2.11.
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
            extra_compile_args=[
                "-O3",
                "-Wall",
                # What keeps a loop from being vectorised without changing what it computes.
                "-fno-math-errno",
                "-fno-trapping-math",
                *(["-g", "-Werror"] if debug else []),
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
