"""The compiled RoI pooling: fake kernel and autograd of csrc/roi_align."""

import torch

from hkd_d2.ops import _checks, _library


def multilevel_roi_align(features, boxes, *, strides, output_size=7, sampling_ratio=0):
    """:func:`hkd_d2.ops.reference.multilevel_roi_align` by the compiled operator."""
    strides = _checks.pooling_arguments("features", features, boxes, strides)
    return torch.ops.hkd_d2.multilevel_roi_align(
        features, boxes, strides, *_checks.bins(output_size), sampling_ratio
    )


def is_channels_last(tensor):
    """Whether the compiled operators read a map as NHWC; what is neither is copied to NCHW."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def empty_gradient(tensor):
    """A gradient as the compiled operators allocate it for a map."""
    return _empty(tensor, tensor.shape, is_channels_last(tensor))


def _empty(like, shape, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _fake(features, boxes, strides, rows, columns, sampling_ratio):
    rois = sum(b.shape[0] for b in boxes)
    return features[0].new_empty(rois, features[0].shape[1], rows, columns)


def _backward_fake(grad, boxes, strides, sampling_ratio, heights, widths, channels_last, _):
    return [
        _empty(grad, (len(boxes), grad.shape[1], height, width), last)
        for height, width, last in zip(heights, widths, channels_last, strict=True)
    ]


def _setup_context(ctx, inputs, output):
    features, boxes, ctx.strides, _, _, ctx.sampling_ratio = inputs
    # The maps themselves are not needed again.
    ctx.save_for_backward(*boxes)
    ctx.shapes = (
        [m.shape[2] for m in features],
        [m.shape[3] for m in features],
        [is_channels_last(m) for m in features],
    )


def _backward(ctx, grad):
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


_library.register(
    "multilevel_roi_align",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
