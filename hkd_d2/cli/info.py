"""Versions, what is compiled, for which device, and which implementation of each operator runs."""

import argparse
import importlib
import platform


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    from hkd_d2.ops.__main__ import main

    print(f"{'Python':<16}{platform.python_version()}, {platform.platform()}")
    for module in ("torchvision", "detectron2", "onnxruntime"):
        try:
            version = getattr(importlib.import_module(module), "__version__", "installed")
        except ImportError:
            version = "not installed"
        print(f"{module:<16}{version}")
    print(f"{'GPU':<16}{gpus()}")
    main()
    return 0


def gpus() -> str:
    """Names of the GPUs that PyTorch sees."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "none"
