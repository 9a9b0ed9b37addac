"""hkd_d2: hierarchical knowledge distillation of pedestrian detectors in Detectron2.

Importing the package imports nothing else: every name below, and every submodule, is imported when
it is first asked for. ``hkd_d2.ops`` works with PyTorch alone, ``evaluate_miss_rate`` with NumPy,
``load_detector`` of an ONNX file without Detectron2; the rest needs Detectron2.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hkd_d2.config import add_hkd_config as add_hkd_config
    from hkd_d2.config import load_config as load_config
    from hkd_d2.config import student_config as student_config
    from hkd_d2.data.datasets import register_dataset as register_dataset
    from hkd_d2.data.datasets import register_datasets as register_datasets
    from hkd_d2.distillation.detector_pass import DetectorPass as DetectorPass
    from hkd_d2.distillation.detector_pass import Targets as Targets
    from hkd_d2.distillation.spec import DenseSpec as DenseSpec
    from hkd_d2.distillation.spec import DetectorSpec as DetectorSpec
    from hkd_d2.distillation.term import TERM_REGISTRY as TERM_REGISTRY
    from hkd_d2.distillation.term import Term as Term
    from hkd_d2.distillation.term import build_terms as build_terms
    from hkd_d2.distillation.term import find_terms as find_terms
    from hkd_d2.engine import Trainer as Trainer
    from hkd_d2.evaluation import MissRateResult as MissRateResult
    from hkd_d2.evaluation import PedestrianEvaluator as PedestrianEvaluator
    from hkd_d2.evaluation import evaluate_miss_rate as evaluate_miss_rate
    from hkd_d2.export.ship import ship as ship
    from hkd_d2.inference import Detections as Detections
    from hkd_d2.inference import Detector as Detector
    from hkd_d2.inference import load_detector as load_detector
    from hkd_d2.inference import read_image as read_image
    from hkd_d2.modeling.checkpoint import StudentCheckpointer as StudentCheckpointer
    from hkd_d2.modeling.families import detector_spec as detector_spec
    from hkd_d2.modeling.meta_arch import HKDDetector as HKDDetector
    from hkd_d2.modeling.teacher import Teacher as Teacher

__version__ = "0.1.0"

# The module of each public name.
_PUBLIC = {
    "DenseSpec": "distillation.spec",
    "Detections": "inference",
    "Detector": "inference",
    "DetectorPass": "distillation.detector_pass",
    "DetectorSpec": "distillation.spec",
    "HKDDetector": "modeling.meta_arch",
    "MissRateResult": "evaluation",
    "PedestrianEvaluator": "evaluation",
    "StudentCheckpointer": "modeling.checkpoint",
    "TERM_REGISTRY": "distillation.term",
    "Targets": "distillation.detector_pass",
    "Teacher": "modeling.teacher",
    "Term": "distillation.term",
    "Trainer": "engine",
    "add_hkd_config": "config",
    "build_terms": "distillation.term",
    "detector_spec": "modeling.families",
    "evaluate_miss_rate": "evaluation",
    "find_terms": "distillation.term",
    "load_config": "config",
    "load_detector": "inference",
    "read_image": "inference",
    "register_dataset": "data.datasets",
    "register_datasets": "data.datasets",
    "ship": "export.ship",
    "student_config": "config",
}

_SUBMODULES = (
    "cli",
    "config",
    "configuration",
    "data",
    "distillation",
    "engine",
    "evaluation",
    "export",
    "inference",
    "modeling",
    "ops",
    "pretraining",
    "serve",
    "visualization",
)

# Written out, for type checkers.
__all__ = [
    "DenseSpec",
    "Detections",
    "Detector",
    "DetectorPass",
    "DetectorSpec",
    "HKDDetector",
    "MissRateResult",
    "PedestrianEvaluator",
    "StudentCheckpointer",
    "TERM_REGISTRY",
    "Targets",
    "Teacher",
    "Term",
    "Trainer",
    "add_hkd_config",
    "build_terms",
    "detector_spec",
    "evaluate_miss_rate",
    "find_terms",
    "load_config",
    "load_detector",
    "read_image",
    "register_dataset",
    "register_datasets",
    "ship",
    "student_config",
]


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *_SUBMODULES, *__all__]
