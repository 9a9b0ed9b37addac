"""Pedestrian data: loaders, the training convention and the mapper.

The mapper is imported on first use, so that :mod:`hkd_d2.data.text_files` and
:mod:`hkd_d2.data.annotation_rules` work where PyTorch and Detectron2 are not installed.
"""

import importlib
from typing import Any

__all__ = ["PedestrianMapper", "is_ignored", "training_counts"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        importlib.import_module("hkd_d2._requirements")
        return getattr(importlib.import_module("hkd_d2.data.mapper"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
