"""The compiled reader and matcher, ``csrc/evaluation``, where this installation has them."""

import warnings

__all__ = ["COMPILED", "read_annotations", "read_detections", "trace_setups", "use_compiled"]

try:
    from hkd_d2._native import read_annotations, read_detections, trace_setups

    COMPILED = True
except ImportError as _error:
    COMPILED = False
    read_annotations = read_detections = trace_setups = None
    if not isinstance(_error, ModuleNotFoundError):  # from an older state of csrc/
        warnings.warn(
            "hkd_d2._native does not fit this version of hkd_d2, so the slower evaluation in "
            "NumPy runs; build it again with 'pip install --no-build-isolation -e .' "
            f"({_error}).",
            stacklevel=2,
        )


def use_compiled(impl: str | None) -> bool:
    """Choose the implementation.

    Args:
        impl: "compiled", "reference", or None for the first where it is there.

    Raises:
        ValueError: any other ``impl``.
        RuntimeError: "compiled" where it is not compiled.
    """
    if impl not in (None, "compiled", "reference"):
        raise ValueError(f"impl is {impl!r}; choose one of None, compiled, reference.")
    if impl == "compiled" and not COMPILED:
        raise RuntimeError(
            "impl is 'compiled', but hkd_d2._native is not compiled in this installation; pass "
            "impl=None to use what there is."
        )
    return COMPILED and impl != "reference"
