"""hkd_d2: hierarchical knowledge distillation of pedestrian detectors in Detectron2.

Importing the package imports nothing else: ``hkd_d2.ops`` works with PyTorch alone, the rest needs
Detectron2, but for ``hkd_d2.load_detector`` of an ONNX file. Submodules are imported when they are
first asked for.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "config",
    "data",
    "distillation",
    "engine",
    "evaluation",
    "inference",
    "modeling",
    "ops",
    "visualization",
)


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "load_detector":
        return importlib.import_module(f"{__name__}.inference").load_detector
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__():
    return [*globals(), *_SUBMODULES, "load_detector"]
