"""The random states of a process, as plain containers that a checkpoint may hold."""

import random

import numpy as np
import torch


def random_state() -> dict:
    """Python's, NumPy's and PyTorch's random states, of the CPU and of the GPU in use."""
    _, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (keys.tolist(), *rest),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    # A forked worker cannot ask the GPU and draws nothing from it.
    if torch.cuda.is_initialized() and torch.utils.data.get_worker_info() is None:
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return state


def set_random_state(state: dict) -> None:
    """The reverse of :func:`random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, *rest = state["numpy"]
    if not (type(rest[0]) is int and 0 <= rest[0] <= len(keys)):  # NumPy would read beyond them
        raise ValueError("NumPy's random state has no such position")
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def check_random_state(state: dict) -> None:
    """Raise, as Python, NumPy and PyTorch do, unless ``state`` can be set; nothing is changed."""
    before = random_state()
    try:
        set_random_state(state)
        random.gauss(0, 1), np.random.standard_normal()
    finally:
        set_random_state(before)


def _tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
