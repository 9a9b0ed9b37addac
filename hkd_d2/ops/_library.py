"""Loads what is compiled and says which operators exist for which device."""

import contextlib
import importlib
import warnings

import torch

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


def _load(name):
    """Import a compiled module of hkd_d2; None where it was not built or does not fit."""
    try:
        return importlib.import_module(f"hkd_d2.{name}")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        _warn_misfit(name, error)
        return None


def _warn_misfit(name, error):
    # Built for another PyTorch, or from an older state of csrc/.
    warnings.warn(
        f"hkd_d2.{name} does not fit PyTorch {torch.__version__} or this version of hkd_d2, so the "
        "slower PyTorch implementations run; build it again with "
        f"'pip install --no-build-isolation -e .' ({error}).",
        stacklevel=2,
    )


def _compiled():
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
_definitions_only = False


def build_info():
    """How the operators were built, and which implementation of each runs here.

    ``python -m hkd_d2.ops`` prints it.

    Returns:
        dict: always

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


def distinct(tensors):
    """The tensors without None and repetitions, and the place of each, -1 for None.

    So schemas take the adapters of levels: levels that share one get one gradient, summed inside
    the operator.
    """
    tensors = list(tensors)
    kept = list({id(t): t for t in tensors if t is not None}.values())
    places = {id(t): place for place, t in enumerate(kept)}
    return kept, [-1 if t is None else places[id(t)] for t in tensors]


def save_lists(ctx, *lists):
    """Save lists of tensors for backward, where :func:`saved_lists` gives them back."""
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors))


def saved_lists(ctx):
    tensors = iter(ctx.saved_tensors)
    return [[next(tensors) for _ in range(length)] for length in ctx.lengths]


@contextlib.contextmanager
def definitions_only():
    """Operators that are called without ``impl`` run their definition, in every thread."""
    global _definitions_only
    before, _definitions_only = _definitions_only, True
    try:
        yield
    finally:
        _definitions_only = before


def use_fused(impl, operator, device):
    """Resolve ``impl`` to True (compiled) or False (reference).

    Raises:
        ValueError: an unknown ``impl``.
        RuntimeError: ``impl="fused"`` where the operator is not compiled for the device.
    """
    _checks.one_of("impl", impl, (None, "fused", "reference"))
    compiled = (operator, device.type) in COMPILED
    if impl is None and _definitions_only:
        return False
    if impl == "fused" and not compiled:
        raise RuntimeError(
            f"impl is 'fused', but {operator} is not compiled for {device.type} in this "
            "installation; pass impl=None to use what there is."
        )
    return compiled and impl != "reference"
