"""A student's weights as safetensors: tensors and nothing that could run."""

import json
from pathlib import Path

from torch import nn

from hkd_d2.files import written_beside


def save_safetensors(model: nn.Module, metadata: dict, path: Path) -> None:
    """Write a detector's state under its own names, with ``metadata`` as JSON under ``hkd_d2``.

    :class:`hkd_d2.modeling.checkpoint.StudentCheckpointer` reads it, so ``MODEL.WEIGHTS``,
    ``HKD.TEACHER.WEIGHTS`` and :func:`hkd_d2.load_detector` take it as they take a ``.pth``.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise ImportError(
            "Safetensors files need safetensors; install it with: pip install safetensors"
        ) from error
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    with written_beside(path) as part:
        part.write_bytes(save(state, {"format": "pt", "hkd_d2": json.dumps(metadata)}))
