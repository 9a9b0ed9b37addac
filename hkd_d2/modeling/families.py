"""The choice between the functions of ``two_stage`` and ``one_stage`` that advance a detector."""

from types import ModuleType

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from hkd_d2.distillation.spec import DetectorSpec
from hkd_d2.modeling import one_stage, two_stage


def family_of(model: nn.Module) -> ModuleType:
    """The module whose ``advance_student``, ``student_losses`` and ``advance_teacher`` fit."""
    return one_stage if isinstance(model, DenseDetector) else two_stage


def check_detector(model: nn.Module, role: str) -> None:
    """Raise ValueError unless ``model`` can be advanced.

    Args:
        role: "student" or "teacher", for the sentence.
    """
    if isinstance(model, DenseDetector):
        one_stage.check_one_stage(model, role)
    else:
        two_stage.check_two_stage(model, role)


def check_fused_pooler(model: nn.Module, role: str) -> None:
    """Raise ValueError where the fused pooler cannot stand for the detector's; see two_stage."""
    if not isinstance(model, DenseDetector):
        two_stage.check_fused_pooler(model, role)


def detector_spec(model: nn.Module) -> DetectorSpec:
    """Read the shapes that terms need off a built detector."""
    return family_of(model).detector_spec(model)
