"""Devices of PyTorch: whether one is there, and what it is called."""

import platform
from pathlib import Path

import torch


def check_device(device: str, name: str = "MODEL.DEVICE") -> None:
    """Check that PyTorch knows a device and this machine has it.

    Args:
        device: cpu, cuda or cuda:N.
        name: what the user set, for messages.

    Raises:
        ValueError: it is another or not there.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is '{device}'; give cpu, cuda or cuda:N.")
    if found.type == "cuda":
        number = torch.cuda.device_count()
        if not number:
            raise ValueError(f"{name} is {device} and no GPU is found; set it to cpu.")
        if (found.index or 0) >= number:
            raise ValueError(
                f"{name} is {device} and this machine has {number}, counted from cuda:0."
            )


def device_name(device: torch.device) -> str:
    """Model of the processor or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
