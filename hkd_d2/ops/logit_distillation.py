"""The compiled logit losses: fake kernels and autograd of csrc/logit_distillation.

Autograd saves the arguments, of which the backward operator computes everything again.
"""

import torch

from hkd_d2.ops import _checks, _library


def _detached(tensors):
    return [t.detach() for t in tensors]


def _empty_loss(tensor):
    return tensor.new_empty((), dtype=_checks.loss_dtype(tensor))


# ------------------------------------------------------------------------------- rows of classes
def kl_distillation_loss(
    student_logits, teacher_logits, *, temperature=1.0, weights=None, activation="softmax"
):
    """:func:`hkd_d2.ops.reference.kl_distillation_loss` by the compiled operator."""
    student, teacher, weights = _checks.logits_and_weights(student_logits, teacher_logits, weights)
    _checks.positive("temperature", temperature)
    _checks.one_of("activation", activation, ("softmax", "sigmoid"))
    dtype = _checks.loss_dtype(student[0])
    loss, _ = torch.ops.hkd_d2.kl_distillation_loss(
        student,
        _detached(teacher),
        [w.detach().to(dtype) for w in weights],
        float(temperature),
        activation == "sigmoid",
    )
    return loss


def soft_cross_entropy_loss(
    student_logits,
    teacher_logits,
    *,
    temperature=1.0,
    class_weights=None,
    weights=None,
    activation="softmax",
):
    """:func:`hkd_d2.ops.reference.soft_cross_entropy_loss` by the compiled operator."""
    student, teacher, weights = _checks.logits_and_weights(student_logits, teacher_logits, weights)
    _checks.class_weights(class_weights, student[0])
    _checks.positive("temperature", temperature)
    _checks.one_of("activation", activation, ("softmax", "sigmoid"))
    dtype = _checks.loss_dtype(student[0])
    loss, _ = torch.ops.hkd_d2.soft_cross_entropy_loss(
        student,
        _detached(teacher),
        [w.detach().to(dtype) for w in weights],
        None if class_weights is None else class_weights.detach().to(dtype),
        float(temperature),
        activation == "sigmoid",
    )
    return loss


def _loss_fake(student_logits, *_):
    return _empty_loss(student_logits[0]), _empty_loss(student_logits[0])


def _rows_backward_fake(grad, normalizer, student_logits, *_):
    return [x.new_empty(x.shape) for x in student_logits]


def _setup_lists(ctx, lists, output):
    """Save what backward reads again; the normaliser is no loss and has no gradient."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _library.save_lists(ctx, [output[1]], *lists)


def _kl_setup_context(ctx, inputs, output):
    *lists, ctx.temperature, ctx.sigmoid = inputs
    _setup_lists(ctx, lists, output)


def _kl_backward(ctx, grad, _):
    (normalizer,), student, teacher, weights = _library.saved_lists(ctx)
    gradients = [None] * len(student)
    if grad is not None:
        gradients = torch.ops.hkd_d2.kl_distillation_loss_backward(
            grad, normalizer, student, teacher, weights, ctx.temperature, ctx.sigmoid
        )
    return gradients, [None] * len(teacher), [None] * len(weights), None, None


_library.register(
    "kl_distillation_loss",
    fake=_loss_fake,
    backward_fake=_rows_backward_fake,
    setup_context=_kl_setup_context,
    backward=_kl_backward,
)


def _cross_entropy_setup_context(ctx, inputs, output):
    *lists, class_weights, ctx.temperature, ctx.sigmoid = inputs
    _setup_lists(ctx, [*lists, [class_weights]], output)


def _cross_entropy_backward(ctx, grad, _):
    (normalizer,), student, teacher, weights, (class_weights,) = _library.saved_lists(ctx)
    gradients = [None] * len(student)
    if grad is not None:
        gradients = torch.ops.hkd_d2.soft_cross_entropy_loss_backward(
            *(grad, normalizer, student, teacher, weights, class_weights),
            *(ctx.temperature, ctx.sigmoid),
        )
    return gradients, [None] * len(teacher), [None] * len(weights), None, None, None


_library.register(
    "soft_cross_entropy_loss",
    fake=_loss_fake,
    backward_fake=_rows_backward_fake,
    setup_context=_cross_entropy_setup_context,
    backward=_cross_entropy_backward,
)


# ---------------------------------------------------------------------- adaptive distillation loss
def adaptive_distillation_loss(
    student_logits,
    teacher_probs,
    *,
    gamma=2.0,
    alpha=0.5,
    beta_c=0.0,
    theta=1.8,
    outer="bce",
    ignore=None,
    normalizer="theta",
):
    """:func:`hkd_d2.ops.reference.adaptive_distillation_loss` by the compiled operator."""
    logits, probs, ignored = _checks.adaptive(
        student_logits, teacher_probs, gamma, outer, ignore, normalizer
    )
    loss, _ = torch.ops.hkd_d2.adaptive_distillation_loss(
        logits,
        _detached(probs),
        ignored,
        float(gamma),
        float(alpha),
        float(beta_c),
        None if normalizer is None else float(theta),
        outer == "kl",
    )
    return loss


def _adaptive_backward_fake(grad, normalizer, student_logits, *_):
    return [torch.empty_like(x) for x in student_logits]


def _adaptive_setup_context(ctx, inputs, output):
    *lists, gamma, alpha, beta_c, _, kl = inputs
    ctx.options = gamma, alpha, beta_c, kl
    _setup_lists(ctx, lists, output)


def _adaptive_backward(ctx, grad, _):
    (normalizer,), logits, probs, ignore = _library.saved_lists(ctx)
    gradients = [None] * len(logits)
    if grad is not None:
        gradients = torch.ops.hkd_d2.adaptive_distillation_loss_backward(
            grad, normalizer, logits, probs, ignore, *ctx.options
        )
    return gradients, [None] * len(probs), [None] * len(ignore), None, None, None, None, None


_library.register(
    "adaptive_distillation_loss",
    fake=_loss_fake,
    backward_fake=_adaptive_backward_fake,
    setup_context=_adaptive_setup_context,
    backward=_adaptive_backward,
)


# ------------------------------------------------------------------------------ bounded regression
def bounded_regression_loss(
    student_deltas, teacher_deltas, target_deltas, *, margin=0.01, normalizer=None
):
    """:func:`hkd_d2.ops.reference.bounded_regression_loss` by the compiled operator."""
    _checks.bounded_deltas(student_deltas, teacher_deltas, target_deltas, normalizer)
    given = isinstance(normalizer, torch.Tensor)
    number = len(student_deltas) if normalizer is None or given else normalizer
    return torch.ops.hkd_d2.bounded_regression_loss(
        student_deltas,
        teacher_deltas.detach(),
        target_deltas.detach(),
        float(margin),
        normalizer.detach() if given else None,
        float(number),
    )


def _bounded_fake(student_deltas, *_):
    return _empty_loss(student_deltas)


def _bounded_backward_fake(grad, student_deltas, *_):
    return student_deltas.new_empty(student_deltas.shape)


def _bounded_setup_context(ctx, inputs, output):
    student, teacher, target, ctx.margin, normalizer, ctx.number = inputs
    ctx.save_for_backward(student, teacher, target, normalizer)


def _bounded_backward(ctx, grad):
    student, teacher, target, normalizer = ctx.saved_tensors
    gradient = torch.ops.hkd_d2.bounded_regression_loss_backward(
        grad, student, teacher, target, ctx.margin, normalizer, ctx.number
    )
    return gradient, None, None, None, None, None


_library.register(
    "bounded_regression_loss",
    fake=_bounded_fake,
    backward_fake=_bounded_backward_fake,
    setup_context=_bounded_setup_context,
    backward=_bounded_backward,
)
