"""Loads the compiled operators and says which of them exist for which device."""

import importlib
import warnings

import torch

from hkd_d2.ops import _checks

OPERATORS = ("kl_distillation_loss",)


def _load():
    """Return the compiled (operator, device type) pairs, none where the module was not built."""
    try:
        importlib.import_module("hkd_d2._C")
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return frozenset(
            (operator, device)
            for operator in OPERATORS
            for device in ("cpu", "cuda")
            if has_kernel(f"hkd_d2::{operator}", device.upper())
        )
    except ModuleNotFoundError:
        return frozenset()
    except (ImportError, RuntimeError) as error:
        # Built for another PyTorch, or from an older state of csrc/.
        warnings.warn(
            f"hkd_d2._C does not fit PyTorch {torch.__version__} or this version of hkd_d2, so the "
            "slower PyTorch implementations run; build it again with "
            f"'pip install --no-build-isolation -e .' ({error}).",
            stacklevel=2,
        )
        return frozenset()


COMPILED = _load()


def register(operator, *, fake, backward_fake, setup_context, backward):
    """Give a compiled operator and its ``_backward`` their fake kernels and autograd.

    Nothing happens where the operator is not compiled. The backward operator refuses to be
    differentiated: without a formula, PyTorch would give wrong second derivatives with a warning.
    """
    if not any(name == operator for name, _ in COMPILED):
        return

    def no_double_backward(ctx, *grads):
        raise RuntimeError(
            f"The compiled {operator} has no second derivative; pass impl='reference'."
        )

    name = f"hkd_d2::{operator}"
    torch.library.register_fake(name, fake)
    torch.library.register_fake(f"{name}_backward", backward_fake)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_autograd(f"{name}_backward", no_double_backward)


def use_fused(impl, operator, device):
    """Resolve ``impl`` to True (compiled) or False (reference).

    Raises:
        ValueError: an unknown ``impl``.
        RuntimeError: ``impl="fused"`` where the operator is not compiled for the device.
    """
    _checks.one_of("impl", impl, (None, "fused", "reference"))
    compiled = (operator, device.type) in COMPILED
    if impl == "fused" and not compiled:
        raise RuntimeError(
            f"impl is 'fused', but {operator} is not compiled for {device.type} in this "
            "installation; pass impl=None to use what there is."
        )
    return compiled and impl != "reference"
