"""The fused RoI pooling: fake kernel and autograd of csrc/roi_align.

Pooling is linear in the maps, so the derivative of its backward operator is pooling again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hkd_d2.ops import _checks, _library


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    strides: Sequence[float],
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 0,
) -> Tensor:
    """:func:`hkd_d2.ops.reference.multilevel_roi_align` by the fused operator."""
    strides = _checks.pooling_arguments("features", features, boxes, strides)
    return torch.ops.hkd_d2.multilevel_roi_align(
        features, boxes, strides, *_checks.bins(output_size), sampling_ratio
    )


def is_channels_last(tensor: Tensor) -> bool:
    """True where the fused operators read a map as NHWC; what is neither is copied to NCHW."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def empty_gradient(tensor: Tensor) -> Tensor:
    """A gradient as the fused operators allocate it for a map."""
    return _empty(tensor, tensor.shape, is_channels_last(tensor))


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _fake(
    features: list[Tensor],
    boxes: list[Tensor],
    strides: list[float],
    rows: int,
    columns: int,
    sampling_ratio: int,
) -> Tensor:
    rois = sum(b.shape[0] for b in boxes)
    return features[0].new_empty(rois, features[0].shape[1], rows, columns)


def _backward_fake(
    grad: Tensor,
    boxes: list[Tensor],
    strides: list[float],
    sampling_ratio: int,
    heights: list[int],
    widths: list[int],
    channels_last: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    return [
        _empty(grad, (len(boxes), grad.shape[1], height, width), last)
        for height, width, last in zip(heights, widths, channels_last, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, ctx.strides, _, _, ctx.sampling_ratio = inputs
    # The maps themselves are not needed again.
    ctx.save_for_backward(*boxes)
    ctx.shapes = (
        [m.shape[2] for m in features],
        [m.shape[3] for m in features],
        [is_channels_last(m) for m in features],
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    boxes = list(ctx.saved_tensors)
    gradients = torch.ops.hkd_d2.multilevel_roi_align_backward(
        grad,
        boxes,
        ctx.strides,
        ctx.sampling_ratio,
        *ctx.shapes,
        torch.are_deterministic_algorithms_enabled(),
    )
    return gradients, [None] * len(boxes), None, None, None, None


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, boxes, ctx.strides, ctx.sampling_ratio, *_ = inputs
    ctx.bins = grad.shape[2:]
    ctx.save_for_backward(*boxes)


def _double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    boxes = list(ctx.saved_tensors)
    pooled = torch.ops.hkd_d2.multilevel_roi_align(
        grads, boxes, ctx.strides, *ctx.bins, ctx.sampling_ratio
    )
    return pooled, [None] * len(boxes), *[None] * 6


_library.register(
    "multilevel_roi_align",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    backward_setup_context=_backward_setup_context,
    double_backward=_double_backward,
)
