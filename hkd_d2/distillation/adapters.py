"""Adapters from the student's channels to the teacher's.

A 1x1 adapter is an ``nn.Linear`` over channels: its weight (C_t, C_s) and bias are what the
operators take, so that they multiply active cells and bins alone. A 3x3 adapter is a
convolution over the whole map.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hkd_d2.distillation.checks import one_of

LINEAR = ("auto", "always")
CONVOLUTIONS = ("conv3x3", "conv3x3_relu")


def make_adapter(
    student_channels: int,
    teacher_channels: int,
    mode: str,
    key: str,
    modes: tuple[str, ...] = LINEAR,
) -> nn.Module | None:
    """Return the adapter between two widths, or None where none is wanted.

    Args:
        mode: ``auto`` (1x1, only where the widths differ), ``always`` (1x1), ``conv3x3``, or
            ``conv3x3_relu``, which a ReLU follows. The weights of a convolution start near 0, from
            a normal distribution of deviation 1e-4 cut off at twice that, as in FGFI and DeFeat
            (twangnh/Distilling-Object-Detectors c6583f3, ggjy/DeFeat.pytorch c46a793); its biases
            at 0 (ours).
        key: config key of ``mode``, for the error.
        modes: the modes that this key knows.

    Raises:
        ValueError: an unknown mode.
    """
    one_of(key, mode, modes)
    if mode in CONVOLUTIONS:
        convolution = nn.Conv2d(student_channels, teacher_channels, 3, padding=1)
        nn.init.trunc_normal_(convolution.weight, std=1e-4, a=-2e-4, b=2e-4)
        nn.init.zeros_(convolution.bias)
        return convolution if mode == "conv3x3" else nn.Sequential(convolution, nn.ReLU())
    if mode == "auto" and student_channels == teacher_channels:
        return None
    return nn.Linear(student_channels, teacher_channels)


def as_pair(adapter: nn.Linear | None):
    """``(weight, bias)`` of a 1x1 adapter as the operators take it, None for None."""
    return None if adapter is None else (adapter.weight, adapter.bias)


def adapt_map(feature: torch.Tensor, adapter: nn.Module | None) -> torch.Tensor:
    """A whole (N, C_s, H, W) map through an adapter of either kind, (N, C_t, H, W)."""
    if isinstance(adapter, nn.Linear):
        return F.conv2d(feature, adapter.weight[:, :, None, None], adapter.bias)
    return feature if adapter is None else adapter(feature)
