"""The fused logit losses: fake kernels and autograd of csrc/logit_distillation.

Autograd saves the arguments, of which the backward operator computes everything again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hkd_d2.ops import _checks, _library


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


def _empty_loss(tensor: Tensor) -> Tensor:
    return tensor.new_empty((), dtype=_checks.loss_dtype(tensor))


# ------------------------------------------------------------------------------- rows of classes
def kl_distillation_loss(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    temperature: float = 1.0,
    weights: Tensor | Sequence[Tensor] | None = None,
    activation: str = "softmax",
) -> Tensor:
    """:func:`hkd_d2.ops.reference.kl_distillation_loss` by the fused operator."""
    student, teacher, row_weights = _checks.logits_and_weights(
        student_logits, teacher_logits, weights
    )
    _checks.positive("temperature", temperature)
    _checks.one_of("activation", activation, ("softmax", "sigmoid"))
    dtype = _checks.loss_dtype(student[0])
    loss, _ = torch.ops.hkd_d2.kl_distillation_loss(
        student,
        _detached(teacher),
        [w.detach().to(dtype) for w in row_weights],
        float(temperature),
        activation == "sigmoid",
    )
    return loss


def soft_cross_entropy_loss(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    temperature: float = 1.0,
    class_weights: Tensor | None = None,
    weights: Tensor | Sequence[Tensor] | None = None,
    activation: str = "softmax",
) -> Tensor:
    """:func:`hkd_d2.ops.reference.soft_cross_entropy_loss` by the fused operator."""
    student, teacher, row_weights = _checks.logits_and_weights(
        student_logits, teacher_logits, weights
    )
    _checks.class_weights(class_weights, student[0])
    _checks.positive("temperature", temperature)
    _checks.one_of("activation", activation, ("softmax", "sigmoid"))
    dtype = _checks.loss_dtype(student[0])
    loss, _ = torch.ops.hkd_d2.soft_cross_entropy_loss(
        student,
        _detached(teacher),
        [w.detach().to(dtype) for w in row_weights],
        None if class_weights is None else class_weights.detach().to(dtype),
        float(temperature),
        activation == "sigmoid",
    )
    return loss


def _loss_fake(student_logits: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_loss(student_logits[0]), _empty_loss(student_logits[0])


def _rows_backward_fake(
    grad: Tensor, normalizer: Tensor, student_logits: list[Tensor], *_: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in student_logits]


def _setup_lists(ctx: Any, lists: Sequence[Sequence[Tensor | None]], output: Any) -> None:
    """Save what backward reads again; the normaliser is no loss and has no gradient."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _library.save_lists(ctx, [output[1]], *lists)


def _kl_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *lists, ctx.temperature, ctx.sigmoid = inputs
    _setup_lists(ctx, lists, output)


def _kl_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    (normalizer,), student, teacher, weights = _library.saved_lists(ctx)
    gradients: list[Tensor | None] = [None] * len(student)
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


def _cross_entropy_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *lists, class_weights, ctx.temperature, ctx.sigmoid = inputs
    _setup_lists(ctx, [*lists, [class_weights]], output)


def _cross_entropy_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    (normalizer,), student, teacher, weights, (class_weights,) = _library.saved_lists(ctx)
    gradients: list[Tensor | None] = [None] * len(student)
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
    student_logits: Tensor | Sequence[Tensor],
    teacher_probs: Tensor | Sequence[Tensor],
    *,
    gamma: float = 2.0,
    alpha: float = 0.5,
    beta_c: float = 0.0,
    theta: float = 1.8,
    outer: str = "bce",
    ignore: Tensor | Sequence[Tensor] | None = None,
    normalizer: str | None = "theta",
) -> Tensor:
    """:func:`hkd_d2.ops.reference.adaptive_distillation_loss` by the fused operator."""
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


def _adaptive_backward_fake(
    grad: Tensor, normalizer: Tensor, student_logits: list[Tensor], *_: Any
) -> list[Tensor]:
    return [torch.empty_like(x) for x in student_logits]


def _adaptive_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *lists, gamma, alpha, beta_c, _, kl = inputs
    ctx.options = gamma, alpha, beta_c, kl
    _setup_lists(ctx, lists, output)


def _adaptive_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    (normalizer,), logits, probs, ignore = _library.saved_lists(ctx)
    gradients: list[Tensor | None] = [None] * len(logits)
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
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    target_deltas: Tensor,
    *,
    margin: float = 0.01,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """:func:`hkd_d2.ops.reference.bounded_regression_loss` by the fused operator."""
    _checks.bounded_deltas(student_deltas, teacher_deltas, target_deltas, normalizer)
    divisor, number = None, 0.0
    if isinstance(normalizer, Tensor):
        divisor = normalizer.detach()
    else:
        number = float(len(student_deltas) if normalizer is None else normalizer)
    return torch.ops.hkd_d2.bounded_regression_loss(
        student_deltas,
        teacher_deltas.detach(),
        target_deltas.detach(),
        float(margin),
        divisor,
        number,
    )


def _bounded_fake(student_deltas: Tensor, *_: Any) -> Tensor:
    return _empty_loss(student_deltas)


def _bounded_backward_fake(grad: Tensor, student_deltas: Tensor, *_: Any) -> Tensor:
    return student_deltas.new_empty(student_deltas.shape)


def _bounded_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, target, ctx.margin, normalizer, ctx.number = inputs
    ctx.save_for_backward(student, teacher, target, normalizer)


def _bounded_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
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
