"""The distillation losses and RoI pooling of hkd_d2. Needs PyTorch and nothing else.

Every operator is defined in plain PyTorch in :mod:`hkd_d2.ops.reference`; some have a compiled
kernel beside it, which ``impl`` selects.
"""

import functools
import inspect

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "hkd_d2.ops needs PyTorch, which is not installed; install it with: pip install torch"
    ) from None

from hkd_d2.ops import (
    _library,
    feature_imitation,
    logit_distillation,
    reference,
    roi_align,
    roi_distillation,
)
from hkd_d2.ops._library import build_info
from hkd_d2.ops.reference import (
    assign_boxes_to_levels,
    rasterize_boxes,
)

__all__ = [
    "adaptive_distillation_loss",
    "assign_boxes_to_levels",
    "bounded_regression_loss",
    "build_info",
    "feature_imitation_loss",
    "feature_imitation_passthrough",
    "kl_distillation_loss",
    "multilevel_roi_align",
    "rasterize_boxes",
    "roi_distillation_loss",
    "soft_cross_entropy_loss",
]

_IMPL = """
    ``impl`` (str, optional): None runs the compiled kernel where there is one for the device and
    the PyTorch definition elsewhere; ``fused`` insists on the kernel (RuntimeError where it is
    missing); ``reference`` runs the definition. Autocast does not reach inside.
"""


def _operator(definition, fused=None, kernel=None):
    """Make the public operator of a definition and of its compiled form, if it has one.

    Both take the same arguments; the operator takes ``impl`` besides. ``kernel`` is the registered
    operator where it has another name.
    """
    kernel = kernel or definition.__name__
    signature = inspect.signature(definition)
    first = next(iter(signature.parameters))
    impl = inspect.Parameter("impl", inspect.Parameter.KEYWORD_ONLY, default=None)

    @functools.wraps(definition)
    def operator(*args, impl=None, **kwargs):
        tensors = args[0] if args else kwargs.get(first)
        if isinstance(tensors, (list, tuple)) and len(tensors):
            tensors = tensors[0]
        # What is no tensor will be refused by the argument checks, which say how it should look.
        device = getattr(tensors, "device", torch.device("cpu"))
        run = fused if _library.use_fused(impl, kernel, device) else definition
        with torch.autocast(device.type, enabled=False):
            return run(*args, **kwargs)

    operator.__doc__ += _IMPL
    operator.__module__ = __name__
    # Variadic keywords come last.
    parameters = sorted([*signature.parameters.values(), impl], key=lambda p: p.kind)
    operator.__signature__ = signature.replace(parameters=parameters)
    return operator


feature_imitation_loss = _operator(
    reference.feature_imitation_loss, fused=feature_imitation.feature_imitation_loss
)
feature_imitation_passthrough = _operator(
    reference.feature_imitation_passthrough,
    fused=feature_imitation.feature_imitation_passthrough,
    kernel="feature_imitation_loss",
)
multilevel_roi_align = _operator(
    reference.multilevel_roi_align, fused=roi_align.multilevel_roi_align
)
roi_distillation_loss = _operator(
    reference.roi_distillation_loss, fused=roi_distillation.roi_distillation_loss
)
kl_distillation_loss = _operator(
    reference.kl_distillation_loss, fused=logit_distillation.kl_distillation_loss
)
soft_cross_entropy_loss = _operator(
    reference.soft_cross_entropy_loss, fused=logit_distillation.soft_cross_entropy_loss
)
adaptive_distillation_loss = _operator(
    reference.adaptive_distillation_loss, fused=logit_distillation.adaptive_distillation_loss
)
bounded_regression_loss = _operator(
    reference.bounded_regression_loss, fused=logit_distillation.bounded_regression_loss
)
