"""1x1 adapters from the student's channels to the teacher's.

An adapter is an ``nn.Linear`` over channels: its weight (C_t, C_s) and bias are what the operators
take, so that they multiply only the cells or bins that count.
"""

from torch import nn

from hkd_d2.distillation.term import one_of


def make_adapter(
    student_channels: int, teacher_channels: int, mode: str, key: str
) -> nn.Linear | None:
    """Return the adapter between two widths, or None where none is wanted.

    Args:
        mode (str): ``auto`` (only where the widths differ) or ``always``.
        key (str): config key of ``mode``, for the error.

    Raises:
        ValueError: an unknown mode.
    """
    one_of(key, mode, ("auto", "always"))
    if mode == "auto" and student_channels == teacher_channels:
        return None
    return nn.Linear(student_channels, teacher_channels)


def as_pair(adapter: nn.Linear | None):
    """``(weight, bias)`` of an adapter as the operators take it, None for None."""
    return None if adapter is None else (adapter.weight, adapter.bias)
