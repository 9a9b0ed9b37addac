"""The distillation losses and RoI pooling of hkd_d2. Needs PyTorch and nothing else.

Every operator is defined in plain PyTorch in :mod:`hkd_d2.ops.reference` and has a fused kernel
beside it; ``impl`` selects one of the two.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, Protocol, cast, overload

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
    "kl_distillation_loss",
    "multilevel_roi_align",
    "rasterize_boxes",
    "roi_distillation_loss",
    "soft_cross_entropy_loss",
]

_IMPL = """
    ``impl``: None runs the fused kernel where there is one for the device and the reference
    elsewhere; ``fused`` insists on the kernel (RuntimeError where it is missing); ``reference``
    runs plain PyTorch. Fused kernels have reverse-mode derivatives, so None also runs the reference
    inside ``torch.func`` transforms and on dual tensors of ``torch.autograd.forward_ad``. Tensors
    on ``meta`` give shapes. Autocast does not reach inside.
"""

P = ParamSpec("P")
Impl = Literal["fused", "reference"] | None


class Operator(Protocol[P]):
    """A public operator: its reference's arguments, and ``impl``."""

    __name__: str
    __doc__: str

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> torch.Tensor: ...

    @overload
    def __call__(self, *args: Any, impl: Impl, **kwargs: Any) -> torch.Tensor: ...


def _operator(plain: Callable[P, torch.Tensor], fused: Callable[P, torch.Tensor]) -> Operator[P]:
    """Make the public operator of a reference and of the face of its fused kernel.

    Both take the same arguments; the operator takes ``impl`` besides.
    """
    name = plain.__name__
    signature = inspect.signature(plain)
    first = next(iter(signature.parameters))
    impl_parameter = inspect.Parameter(
        "impl", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Impl
    )

    @functools.wraps(plain)
    def operator(*args: Any, impl: Impl = None, **kwargs: Any) -> torch.Tensor:
        tensors = args[0] if args else kwargs.get(first)
        if isinstance(tensors, (list, tuple)) and len(tensors):
            tensors = tensors[0]
        # Anything but a tensor is refused by the argument checks, which say how it should look.
        device = getattr(tensors, "device", torch.device("cpu"))
        run = plain
        if _library.use_fused(impl, name, device):
            if not _library.is_transformed(args, kwargs):
                run = fused
            elif impl == "fused":
                raise RuntimeError(
                    f"impl is 'fused', but the fused {name} has reverse-mode derivatives alone; "
                    "inside torch.func transforms and torch.autograd.forward_ad pass impl=None, "
                    "which runs the reference there."
                )
        if not torch.amp.is_autocast_available(device.type):
            return run(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return run(*args, **kwargs)

    operator.__doc__ = (plain.__doc__ or "") + _IMPL
    operator.__module__ = __name__
    parameters = [*signature.parameters.values(), impl_parameter]
    vars(operator)["__signature__"] = signature.replace(parameters=parameters)
    return cast("Operator[P]", operator)


feature_imitation_loss = _operator(
    reference.feature_imitation_loss, fused=feature_imitation.feature_imitation_loss
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
