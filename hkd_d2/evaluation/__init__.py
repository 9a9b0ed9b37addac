"""Pedestrian evaluation: log-average miss rate (NumPy alone) and a Detectron2 evaluator.

The evaluator is imported on first use, so that :mod:`hkd_d2.evaluation.miss_rate` works where
neither PyTorch nor Detectron2 is installed; so are CrowdHuman's scores.
"""

import importlib

from hkd_d2.evaluation.miss_rate import (
    REFERENCE_FPPI,
    MissRateResult,
    SetupMatches,
    evaluate_miss_rate,
    format_table,
    load_detections,
    load_ground_truth,
    match_setup,
)
from hkd_d2.evaluation.protocols import (
    CITYPERSONS,
    MISSING_POINTS,
    PROTOCOLS,
    SETUPS,
    CrowdHumanProtocol,
    Protocol,
    Setup,
    describe_ranges,
    select_protocol,
    select_setups,
)

_ON_FIRST_USE = {
    "PedestrianEvaluator": "evaluator",
    "check_test_set": "evaluator",
    "coco_ground_truth": "evaluator",
    "pedestrian_class": "evaluator",
    "CrowdHumanResult": "crowdhuman",
    "evaluate_crowdhuman": "crowdhuman",
}

__all__ = [
    "CITYPERSONS",
    "MISSING_POINTS",
    "PROTOCOLS",
    "REFERENCE_FPPI",
    "SETUPS",
    "CrowdHumanProtocol",
    "CrowdHumanResult",
    "MissRateResult",
    "PedestrianEvaluator",
    "Protocol",
    "Setup",
    "SetupMatches",
    "check_test_set",
    "coco_ground_truth",
    "describe_ranges",
    "evaluate_crowdhuman",
    "evaluate_miss_rate",
    "format_table",
    "load_detections",
    "load_ground_truth",
    "match_setup",
    "pedestrian_class",
    "select_protocol",
    "select_setups",
]


def __getattr__(name):
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(f".{_ON_FIRST_USE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
