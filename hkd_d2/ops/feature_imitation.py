"""The fused feature imitation: fake kernels and autograd of csrc/feature_imitation.

One forward and one backward operator take all levels and images; what is in between (mask, level
weights, adapters, means) is theirs, so nothing is computed here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hkd_d2.ops import _checks, _library
from hkd_d2.ops._checks import Adapters


def feature_imitation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], **options: Any
) -> Tensor:
    """:func:`hkd_d2.ops.reference.feature_imitation_loss` by the fused operator."""
    arguments = _arguments(student, teacher, **options)
    if torch.compiler.is_compiling():
        return torch.ops.hkd_d2.feature_imitation_loss(*arguments)[0]
    return _Loss.apply(arguments, *_differentiable(arguments))


class _Loss(torch.autograd.Function):
    """The operator below in half its time: flattening lists in Python takes the rest."""

    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        loss, saved = torch.ops.hkd_d2.feature_imitation_loss(*arguments)
        _save(ctx, arguments, saved)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        student, weights, biases = _gradients(ctx, grad)
        return None, *student, *weights, *biases


def _arguments(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    boxes: Sequence[Tensor] | None = None,
    strides: Sequence[float] | None = None,
    ignore_boxes: Sequence[Tensor] | None = None,
    distance: str = "mse",
    foreground_weight: float = 1.0,
    background_weight: float | None = None,
    box_weights: str = "none",
    assign_ignore: str = "level",
    rasterize: str = "cells",
    anchors: Sequence[Tensor] | None = None,
    anchor_threshold: float = 0.5,
    anchor_offset: float = 0.0,
    spatial_weights: Sequence[Tensor] | None = None,
    channel_weights: Sequence[Tensor] | None = None,
    level_weights: Tensor | Sequence[float] | None = None,
    adapter: Adapters = None,
) -> tuple[Any, ...]:
    """The operator's positional arguments from those of the reference."""
    stride_of_level, background, of_level, masked = _checks.feature_imitation(
        student,
        teacher,
        boxes,
        strides,
        ignore_boxes,
        distance,
        foreground_weight,
        background_weight,
        box_weights,
        assign_ignore,
        rasterize,
        anchors,
        anchor_threshold,
        spatial_weights,
        channel_weights,
        level_weights,
        adapter,
    )
    weights, weight_of_level = _library.distinct(a and a[0] for a in of_level)
    biases, bias_of_level = _library.distinct(a and a[1] for a in of_level)
    if level_weights is not None:
        level_weights = torch.as_tensor(level_weights, device=student[0].device).detach()
        if not level_weights.is_floating_point():
            level_weights = level_weights.float()
    return (
        list(student),
        _detached(teacher),
        weights,
        biases,
        _detached(boxes),
        _detached(ignore_boxes),
        _detached(anchors),
        _detached(spatial_weights),
        _detached(channel_weights),
        level_weights,
        weight_of_level,
        bias_of_level,
        stride_of_level,
        _checks.DISTANCES.index(distance),
        masked,
        float(foreground_weight),
        background,
        box_weights == "area",
        assign_ignore == "all",
        _checks.RASTERIZE_RULES.index(rasterize),
        float(anchor_offset),
        float(anchor_threshold),
    )


def _differentiable(arguments: tuple[Any, ...]) -> list[Tensor]:
    """Student maps, adapter weights and biases, in one row."""
    return [tensor for place in (0, 2, 3) for tensor in arguments[place]]


def _detached(tensors: Sequence[Tensor] | None) -> list[Tensor]:
    return [] if tensors is None else [t.detach() for t in tensors]


# ------------------------------------------------------------------------------- fakes and autograd
def _fake(
    student: list[Tensor],
    teacher: list[Tensor],
    adapter_weights: list[Tensor],
    adapter_biases: list[Tensor],
    boxes: list[Tensor],
    ignore_boxes: list[Tensor],
    anchors: list[Tensor],
    spatial_weights: list[Tensor],
    channel_weights: list[Tensor],
    level_weights: Tensor | None,
    weight_of_level: list[int],
    bias_of_level: list[int],
    strides: list[float],
    distance: int,
    masked: bool,
    *options: Any,
) -> tuple[Tensor, list[Tensor]]:
    dtype = _checks.loss_dtype(student[0])
    saved = []
    for s, t in zip(student, teacher, strict=True):
        images, _, height, width = s.shape
        if _checks.DISTANCES[distance] == "cosine":
            shape: tuple[int, ...] = (2, images, height, width)
        elif _checks.DISTANCES[distance] == "pkd":
            shape = (4, t.shape[1])
        elif masked or spatial_weights:
            shape = (images, height, width)
        else:
            shape = (0,)
        saved.append(s.new_empty(shape, dtype=dtype))
    saved.append(student[0].new_empty(len(student), dtype=torch.float64))
    return student[0].new_empty((), dtype=dtype), saved


def _like_map(s: Tensor) -> Tensor:
    """An empty gradient of a map: of its layout, or NCHW where that is neither."""
    stored = s.is_contiguous() or s.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(s if stored else s.contiguous())


def _backward_fake(
    grad: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    adapter_weights: list[Tensor],
    adapter_biases: list[Tensor],
    *options: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return (
        [_like_map(s) for s in student],
        [torch.empty_like(w, memory_format=torch.contiguous_format) for w in adapter_weights],
        [torch.empty_like(b, memory_format=torch.contiguous_format) for b in adapter_biases],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], saved: list[Tensor]) -> None:
    student, teacher, weights, biases = inputs[:4]
    ctx.weight_of_level, ctx.bias_of_level = inputs[10:12]
    ctx.distance = inputs[13]
    _library.save_lists(ctx, student, teacher, weights, biases, inputs[8], saved)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # no zeros for what was saved
    _save(ctx, inputs, saved)
    # PyTorch wants one None a tensor in the place of a list of tensors, an empty one included.
    ctx.no_gradients = [
        [None] * len(x)
        if isinstance(x, (list, tuple)) and all(isinstance(e, torch.Tensor) for e in x)
        else None
        for x in inputs
    ]


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return tuple(ctx.no_gradients)
    student, weights, biases = _gradients(ctx, grad)
    return student, ctx.no_gradients[1], weights, biases, *ctx.no_gradients[4:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of the student's maps, adapter weights and biases."""
    return torch.ops.hkd_d2.feature_imitation_loss_backward(
        grad,
        *_library.saved_lists(ctx),
        ctx.weight_of_level,
        ctx.bias_of_level,
        ctx.distance,
    )


_library.register(
    "feature_imitation_loss",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
