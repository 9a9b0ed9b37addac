"""The fused RoI distillation: fake kernels and autograd of csrc/roi_distillation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hkd_d2.ops import _checks, _library
from hkd_d2.ops._checks import Adapters
from hkd_d2.ops.roi_align import empty_gradient


def roi_distillation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    strides: Sequence[float],
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 0,
    distance: str = "mse",
    adapter: Adapters = None,
) -> Tensor:
    """:func:`hkd_d2.ops.reference.roi_distillation_loss` by the fused operator."""
    _checks.paired_pyramids(student, teacher)
    _checks.one_of("distance", distance, _checks.DISTANCES[:-1])
    strides = _checks.pooling_arguments("student", student, boxes, strides)
    _checks.pooling_arguments("teacher", teacher, boxes, strides)
    of_level = _checks.adapters(adapter, student, teacher)
    weights, weight_of_level = _library.distinct(a and a[0] for a in of_level)
    biases, bias_of_level = _library.distinct(a and a[1] for a in of_level)
    return torch.ops.hkd_d2.roi_distillation_loss(
        student,
        teacher,
        boxes,
        weights,
        biases,
        weight_of_level,
        bias_of_level,
        strides,
        *_checks.bins(output_size),
        sampling_ratio,
        _checks.DISTANCES.index(distance),
    )


def _fake(student: list[Tensor], *_: Any) -> Tensor:
    return student[0].new_empty((), dtype=_checks.loss_dtype(student[0]))


def _backward_fake(
    grad: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    boxes: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    *_: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return (
        [empty_gradient(m) for m in student],
        [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights],
        [torch.empty_like(b, memory_format=torch.contiguous_format) for b in biases],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *lists, ctx.weight_of_level, ctx.bias_of_level = inputs[:7]
    ctx.options = inputs[7:]
    _library.save_lists(ctx, *lists)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    student, weights, biases = torch.ops.hkd_d2.roi_distillation_loss_backward(
        grad,
        *_library.saved_lists(ctx),
        ctx.weight_of_level,
        ctx.bias_of_level,
        *ctx.options,
        torch.are_deterministic_algorithms_enabled(),
    )
    none = [[None] * length for length in ctx.lengths]
    return student, none[1], none[2], weights, biases, *[None] * (2 + len(ctx.options))


_library.register(
    "roi_distillation_loss",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    advice="compare the tensors of two multilevel_roi_align, which has one",
)
