"""The compiled feature imitation: fake kernels and autograd of csrc/feature_imitation.

One forward and one backward operator take all levels and images; what is in between (mask, level
weights, adapters, means) is theirs, so nothing is computed here.
"""

import torch

from hkd_d2.ops import _checks, _library


def feature_imitation_loss(student, teacher, **options):
    """:func:`hkd_d2.ops.reference.feature_imitation_loss` by the compiled operator."""
    arguments = _arguments(student, teacher, **options)
    if torch.compiler.is_compiling():
        return torch.ops.hkd_d2.feature_imitation_loss(*arguments)[0]
    return _Loss.apply(arguments, *_differentiable(arguments))


def feature_imitation_passthrough(student, teacher, **options):
    """:func:`hkd_d2.ops.reference.feature_imitation_passthrough` by the compiled operator."""
    arguments = _arguments(student, teacher, **options)
    if torch.compiler.is_compiling():
        return list(student), torch.ops.hkd_d2.feature_imitation_loss(*arguments)[0]
    loss, *features = _PassThrough.apply(arguments, *_differentiable(arguments))
    return features, loss


class _Loss(torch.autograd.Function):
    """What is registered below, in half the time: flattening lists in Python takes the rest."""

    @staticmethod
    def forward(ctx, arguments, *tensors):
        loss, saved = torch.ops.hkd_d2.feature_imitation_loss(*arguments)
        _save(ctx, arguments, saved)
        return loss

    @staticmethod
    def backward(ctx, grad):
        student, weights, biases = _gradients(ctx, grad, [])
        return None, *student, *weights, *biases


class _PassThrough(torch.autograd.Function):
    """Hands the student's maps on, and adds their gradient to that of the loss as it is written."""

    @staticmethod
    def forward(ctx, arguments, *tensors):
        ctx.set_materialize_grads(False)
        return _Loss.forward(ctx, arguments), *(s.view_as(s) for s in arguments[0])

    @staticmethod
    def backward(ctx, grad, *incoming):
        if grad is None:
            return None, *incoming, *[None] * sum(ctx.lengths[2:4])
        if all(g is None for g in incoming):
            incoming = []
        incoming = [grad.new_empty(0) if g is None else g for g in incoming]
        student, weights, biases = _gradients(ctx, grad, incoming)
        return None, *student, *weights, *biases


def _arguments(
    student,
    teacher,
    *,
    boxes=None,
    strides=None,
    ignore_boxes=None,
    distance="mse",
    foreground_weight=1.0,
    background_weight=None,
    box_weights="none",
    assign="level",
    assign_ignore=None,
    rasterize="cells",
    anchors=None,
    anchor_threshold=0.5,
    anchor_offset=0.0,
    spatial_weights=None,
    channel_weights=None,
    level_weights=None,
    adapter=None,
):
    """What the operator takes, from what the definition takes."""
    strides, background_weight, assign_ignore, adapter, masked = _checks.feature_imitation(
        student,
        teacher,
        boxes,
        strides,
        ignore_boxes,
        distance,
        foreground_weight,
        background_weight,
        box_weights,
        assign,
        assign_ignore,
        rasterize,
        anchors,
        anchor_threshold,
        spatial_weights,
        channel_weights,
        level_weights,
        adapter,
    )
    weights, weight_of_level = _library.distinct([a and a[0] for a in adapter])
    biases, bias_of_level = _library.distinct([a and a[1] for a in adapter])
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
        strides or [],
        _checks.DISTANCES.index(distance),
        masked,
        float(foreground_weight),
        float(background_weight),
        box_weights == "area",
        assign == "all",
        assign_ignore == "all",
        _checks.RASTERIZE_RULES.index(rasterize),
        float(anchor_offset),
        float(anchor_threshold),
    )


def _differentiable(arguments):
    """Student maps, adapter weights and biases, in one row."""
    return [tensor for place in (0, 2, 3) for tensor in arguments[place]]


def _detached(tensors):
    return [] if tensors is None else [t.detach() for t in tensors]


# ------------------------------------------------------------------------------- fakes and autograd
def _fake(
    student,
    teacher,
    adapter_weights,
    adapter_biases,
    boxes,
    ignore_boxes,
    anchors,
    spatial_weights,
    channel_weights,
    level_weights,
    weight_of_level,
    bias_of_level,
    strides,
    distance,
    masked,
    *options,
):
    dtype = _checks.loss_dtype(student[0])
    saved = []
    for s, t in zip(student, teacher, strict=True):
        images, _, height, width = s.shape
        if _checks.DISTANCES[distance] == "cosine":
            shape = (2, images, height, width)
        elif _checks.DISTANCES[distance] == "pkd":
            shape = (4, t.shape[1])
        elif masked or spatial_weights:
            shape = (images, height, width)
        else:
            shape = (0,)
        saved.append(s.new_empty(shape, dtype=dtype))
    saved.append(student[0].new_empty(len(student), dtype=torch.float64))
    return student[0].new_empty((), dtype=dtype), saved


def _like_map(s):
    """What the gradient of a map looks like: of its layout, or NCHW where that is neither."""
    stored = s.is_contiguous() or s.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(s if stored else s.contiguous())


def _backward_fake(grad, student, teacher, adapter_weights, adapter_biases, *options):
    return (
        [_like_map(s) for s in student],
        [torch.empty_like(w, memory_format=torch.contiguous_format) for w in adapter_weights],
        [torch.empty_like(b, memory_format=torch.contiguous_format) for b in adapter_biases],
    )


def _save(ctx, inputs, saved):
    student, teacher, weights, biases = inputs[:4]
    ctx.weight_of_level, ctx.bias_of_level = inputs[10:12]
    ctx.distance = inputs[13]
    _library.save_lists(ctx, student, teacher, weights, biases, inputs[8], saved)


def _setup_context(ctx, inputs, output):
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


def _backward(ctx, grad, _):
    if grad is None:
        return tuple(ctx.no_gradients)
    student, weights, biases = _gradients(ctx, grad, [])
    return student, ctx.no_gradients[1], weights, biases, *ctx.no_gradients[4:]


def _gradients(ctx, grad, incoming):
    """Gradients of the student's maps, adapter weights and biases."""
    return torch.ops.hkd_d2.feature_imitation_loss_backward(
        grad,
        *_library.saved_lists(ctx),
        incoming,
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
