"""The compiled logit losses: fake kernels and autograd of csrc/logit_distillation."""

import math

import torch

from hkd_d2.ops import _checks, _library


def kl_distillation_loss(
    student_logits, teacher_logits, *, temperature=1.0, weights=None, activation="softmax"
):
    """:func:`hkd_d2.ops.reference.kl_distillation_loss` by the compiled operator."""
    _checks.logits_and_weights(student_logits, teacher_logits, weights)
    _checks.positive("temperature", temperature)
    _checks.one_of("activation", activation, ("softmax", "sigmoid"))
    *rows, classes = student_logits.shape
    shape = (math.prod(rows), classes)
    if weights is not None:
        weights = weights.detach().to(_checks.loss_dtype(student_logits)).reshape(-1)
    return torch.ops.hkd_d2.kl_distillation_loss(
        student_logits.reshape(shape),
        teacher_logits.detach().reshape(shape),
        weights,
        float(temperature),
        activation == "sigmoid",
    )


def _kl_fake(student_logits, teacher_logits, weights, temperature, sigmoid):
    return student_logits.new_empty((), dtype=_checks.loss_dtype(student_logits))


def _kl_backward_fake(grad, student_logits, teacher_logits, weights, temperature, sigmoid):
    return torch.empty_like(student_logits, memory_format=torch.contiguous_format)


def _kl_setup_context(ctx, inputs, output):
    student_logits, teacher_logits, weights, ctx.temperature, ctx.sigmoid = inputs
    ctx.save_for_backward(student_logits, teacher_logits, weights)


def _kl_backward(ctx, grad):
    gradient = torch.ops.hkd_d2.kl_distillation_loss_backward(
        grad, *ctx.saved_tensors, ctx.temperature, ctx.sigmoid
    )
    return gradient, None, None, None, None


_library.register(
    "kl_distillation_loss",
    fake=_kl_fake,
    backward_fake=_kl_backward_fake,
    setup_context=_kl_setup_context,
    backward=_kl_backward,
)
