"""A detector that ``hkd export`` wrote as .pt2 or .ts, run by PyTorch without Detectron2.

Both are programs, and a program may do anything: load only what you wrote yourself.
"""

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision  # noqa: F401  registers torchvision::nms and torchvision::roi_align

from hkd_d2.files import check_archive
from hkd_d2.inference.exported import ExportedDetector, check_metadata

# Where the metadata stand inside either file, as JSON.
METADATA_FILE = "hkd_d2.json"


class ProgramDetector(ExportedDetector):
    """Runs a program on the CPU.

    Args:
        path: of its file, for sentences.
        program: uint8 (N, 3, H, W) to the four outputs of an exported detector.
        metadata, score_threshold, batch_size: see :class:`ExportedDetector`.
    """

    def __init__(
        self,
        path: str | Path,
        program: Callable,
        metadata: dict,
        score_threshold: float | None = None,
        batch_size: int = 8,
    ):
        super().__init__(path, metadata, score_threshold, batch_size)
        self.program = program

    def _outputs(self, batch):
        smallest = self.metadata.get("smallest", 0)
        if min(batch.shape[2:]) < smallest:
            raise ValueError(
                f"The file takes images from {smallest}x{smallest} pixels after resizing, and this "
                f"one is {batch.shape[3]}x{batch.shape[2]}; export it for this size."
            )
        with torch.no_grad():
            outputs = self.program(torch.from_numpy(np.ascontiguousarray(batch)))
        return tuple(x.numpy() for x in outputs)


def load_program(path: Path) -> tuple[Callable, dict]:
    """The program of a .pt2 or .ts, and its metadata.

    The metadata are read first, as text: a file that is none of ours is refused before it runs.

    Raises:
        ValueError: a damaged file, or one that this project did not write.
    """
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith(f"/{METADATA_FILE}")), None)
            metadata = json.loads(archive.read(name)) if name else {}
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    check_metadata(path, metadata)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
            if path.suffix == ".pt2":
                return torch.export.load(path).module(), metadata
            return torch.jit.load(str(path)), metadata
    except Exception as error:  # PyTorch raises many kinds
        raise _unreadable(path, error) from error


def _unreadable(path, error):
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"'{path}' cannot be read as a program of PyTorch ({reason}); export it again with "
        "hkd export."
    )
