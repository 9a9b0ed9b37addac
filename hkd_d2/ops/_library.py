"""Loads what is compiled and says which operators exist for which device."""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import hkd_d2
from hkd_d2.ops import _checks

OPERATORS = (
    "adaptive_distillation_loss",
    "bounded_regression_loss",
    "feature_imitation_loss",
    "kl_distillation_loss",
    "multilevel_roi_align",
    "roi_distillation_loss",
    "soft_cross_entropy_loss",
)

DEVICES = ("cpu", "cuda")


def _load(name: str) -> ModuleType | None:
    """Import a compiled module of hkd_d2; None where it was not built or does not fit."""
    try:
        return importlib.import_module(f"hkd_d2.{name}")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        _warn_misfit(name, error)
        return None


def _warn_misfit(name: str, error: Exception) -> None:
    # Built for another PyTorch, or from an older state of csrc/.
    warnings.warn(
        f"hkd_d2.{name} does not fit PyTorch {torch.__version__} or this version of hkd_d2, so the "
        "slower reference implementations run; build it again with "
        f"'pip install --no-build-isolation -e .' ({error}).",
        stacklevel=2,
    )


def _compiled() -> frozenset[tuple[str, str]]:
    """Return the compiled (operator, device type) pairs, none where nothing was built."""
    if MODULES["_C"] is None:
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    try:
        return frozenset(
            (operator, device)
            for operator in OPERATORS
            for device in DEVICES
            if has_kernel(f"hkd_d2::{operator}", device.upper())
        )
    except RuntimeError as error:
        _warn_misfit("_C", error)
        return frozenset()


# The schemas are in _C; the CUDA kernels are registered under them.
MODULES = {name: _load(name) for name in ("_C", "_C_cuda", "_native")}
COMPILED = _compiled()
_reference_only = False


def build_info() -> dict[str, Any]:
    """Build of the operators, and the implementation of each that runs here.

    ``python -m hkd_d2.ops`` prints it.

    Returns:
        Always

        - ``hkd_d2``, ``torch`` (str): the versions that run;
        - ``modules`` (dict[str, bool]): whether ``_C`` (CPU kernels), ``_C_cuda`` (CUDA kernels)
          and ``_native`` (what is not a tensor operator) are built and fit;
        - ``operators`` (dict[str, dict[str, str]]): for every operator that can be compiled,
          ``fused`` or ``reference`` under ``cpu`` and ``cuda``;

        and where ``_native`` is built

        - ``built_for_torch`` (str): the version that the modules were compiled against;
        - ``compiler`` (str): name and version; ``cxx_standard`` (int), as in 17; ``flags`` (str):
          the compiler's options, those of a debug or sanitizer build among them;
        - ``cpu_isas`` (list[str]): the instruction sets that the CPU kernels are compiled for;
          ``cpu_isa`` (str): the one that this machine runs (``HKD_CPU_ISA`` lowers it);
        - ``cuda`` (str or None): version of the CUDA toolkit, None without CUDA kernels;
          ``cuda_architectures`` (str or None), as in ``TORCH_CUDA_ARCH_LIST``.
    """
    native = MODULES["_native"]
    return {
        "hkd_d2": hkd_d2.__version__,
        "torch": torch.__version__,
        "modules": {name: module is not None for name, module in MODULES.items()},
        "operators": {
            operator: {
                device: "fused" if (operator, device) in COMPILED else "reference"
                for device in DEVICES
            }
            for operator in OPERATORS
        },
        **(native.build_info() if native else {}),
    }


def register(
    operator: str,
    *,
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    backward_setup_context: Callable[..., None] | None = None,
    double_backward: Callable[..., Any] | None = None,
    advice: str = "pass impl='reference'",
) -> None:
    """Give a fused operator and its ``_backward`` their fake kernels and autograd.

    Nothing happens where the operator is not compiled. Without ``double_backward`` the backward
    operator refuses to be differentiated and gives the ``advice``: without a formula, PyTorch would
    give wrong second derivatives with a warning.
    """
    if not any(name == operator for name, _ in COMPILED):
        return

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"The fused {operator} has no second derivative; {advice}.")

    name = f"hkd_d2::{operator}"
    torch.library.register_fake(name, fake)
    torch.library.register_fake(f"{name}_backward", backward_fake)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"{name}_backward", double_backward or refuse, setup_context=backward_setup_context
    )


def distinct(tensors: Iterable[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The tensors without None and repetitions, and the place of each, -1 for None.

    So schemas take the adapters of levels: levels that share one get one gradient, summed inside
    the operator.
    """
    given = list(tensors)
    kept = list({id(t): t for t in given if t is not None}.values())
    places = {id(t): place for place, t in enumerate(kept)}
    return kept, [-1 if t is None else places[id(t)] for t in given]


def save_lists(ctx: Any, *lists: Sequence[Tensor | None]) -> None:
    """Save lists of tensors for backward, where :func:`saved_lists` gives them back."""
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors))


def saved_lists(ctx: Any) -> list[list[Any]]:
    """Return what :func:`save_lists` saved."""
    tensors = iter(ctx.saved_tensors)
    return [[next(tensors) for _ in range(length)] for length in ctx.lengths]


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Operators that are called without ``impl`` run their reference, in every thread."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


def is_transformed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True where a fused kernel would lose derivatives or be refused by PyTorch.

    That is inside transforms of ``torch.func`` (jvp, vmap, grad, ...) and on dual tensors of
    ``torch.autograd.forward_ad``, for which a registered operator gives tangents of 0.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(_is_dual(value) for value in (*args, *kwargs.values()))


def _is_dual(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_dual, value))
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def use_fused(impl: str | None, operator: str, device: torch.device) -> bool:
    """Resolve ``impl`` to True (fused) or False (reference).

    Tensors on ``meta`` have the shapes of a fused operator wherever one is compiled.

    Raises:
        ValueError: an unknown ``impl``.
        RuntimeError: ``impl="fused"`` where the operator is not compiled for the device.
    """
    _checks.one_of("impl", impl, (None, "fused", "reference"))
    devices = DEVICES if device.type == "meta" else (device.type,)
    compiled = any((operator, name) in COMPILED for name in devices)
    if impl is None and _reference_only:
        return False
    if impl == "fused" and not compiled:
        raise RuntimeError(
            f"impl is 'fused', but {operator} is not compiled for {device.type} in this "
            "installation; pass impl=None to use what there is."
        )
    return compiled and impl != "reference"
