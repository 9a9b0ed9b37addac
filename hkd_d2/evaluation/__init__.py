"""Pedestrian evaluation: log-average miss rate (NumPy alone) and a Detectron2 evaluator.

The evaluator is imported on first use, so that :mod:`hkd_d2.evaluation.miss_rate` works where
neither PyTorch nor Detectron2 is installed.
"""

from .miss_rate import (
    MISSING_POINTS,
    REFERENCE_FPPI,
    SETUPS,
    MissRateResult,
    Setup,
    SetupMatches,
    evaluate_miss_rate,
    format_table,
    load_detections,
    load_ground_truth,
    match_setup,
    select_setups,
)

_FROM_EVALUATOR = ("PedestrianEvaluator", "coco_ground_truth")

__all__ = [
    "MISSING_POINTS",
    "REFERENCE_FPPI",
    "SETUPS",
    "MissRateResult",
    "PedestrianEvaluator",
    "Setup",
    "SetupMatches",
    "coco_ground_truth",
    "evaluate_miss_rate",
    "format_table",
    "load_detections",
    "load_ground_truth",
    "match_setup",
    "select_setups",
]


def __getattr__(name):
    if name in _FROM_EVALUATOR:
        from . import evaluator

        return getattr(evaluator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
