"""Ground truth in the forms in which the benchmarks publish it, as COCO's.

======================  =========================================================================
form                    content
======================  =========================================================================
COCO                    a JSON file (:func:`hkd_d2.evaluation.load_ground_truth`)
Caltech's gt-SETUP.mat  what dbEval keeps of one setup: a cell a frame, of rows x, y, w, h, ignore;
                        border and setup are in the flags, and countable boxes have been resized
Caltech's folder        the data set's root, with ``annotations/`` (.vbb, or text of the new ones)
======================  =========================================================================

KAIST's test set is reported as a whole and by its day and night parts, which :func:`select_part`
takes from one file.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hkd_d2.data.mat_files import read_mat
from hkd_d2.data.text_files import shown
from hkd_d2.evaluation.coco_rows import (
    PEDESTRIAN,
    check_ground_truth,
    load_ground_truth,
)
from hkd_d2.evaluation.protocols import CrowdHumanProtocol, Protocol, Setup, select_setups

__all__ = ["KAIST_PARTS", "open_ground_truth", "read_mat_cells", "select_part"]

KAIST_PARTS = ("day", "night")
_DAY = ("set06", "set07", "set08")  # of the test sets; 09 to 11 are by night
_CALTECH_SPLITS = {
    "caltech": "test",
    "caltech_new": "test_new",
    "caltech_new_no_border": "test_new",
}


def open_ground_truth(
    path: str | os.PathLike,
    protocol: Protocol | CrowdHumanProtocol,
    setups: Iterable[str] | None = None,
) -> tuple[dict[str, Any], Protocol | CrowdHumanProtocol, dict[str, Setup]]:
    """Read ground truth in the form that its name tells.

    Args:
        path: a JSON file, a ``gt-SETUP.mat`` or the folder of the Caltech data set.
        protocol: the rules.
        setups: names out of the protocol's setups; None for all that the file can serve.

    Returns:
        The ground truth, the rules that are left to apply to it, and the setups.

    Raises:
        FileNotFoundError: no such file, or one that the folder should have is missing.
        ValueError: malformed, or a setup that the protocol or the file does not have.
        ImportError: SciPy or Detectron2 is missing where the form needs it.
    """
    chosen = {} if isinstance(protocol, CrowdHumanProtocol) else select_setups(setups, protocol)
    if os.path.isdir(path):
        return _read_caltech(path, protocol), protocol, chosen
    if str(path).lower().endswith(".mat"):
        return _read_mat(path, protocol, setups)
    return load_ground_truth(path, protocol), protocol, chosen


def _read_caltech(root: str | os.PathLike, protocol: Protocol) -> dict[str, Any]:
    split = _CALTECH_SPLITS.get(protocol.name)
    if split is None:
        raise ValueError(
            f"{root} is a folder, which is Caltech's form, and protocol {protocol.name!r} is of "
            f"another benchmark; choose {', '.join(_CALTECH_SPLITS)} or give a JSON file."
        )
    try:
        from hkd_d2.data.datasets.caltech import load_caltech
        from hkd_d2.evaluation.evaluator import coco_ground_truth
    except ImportError as error:
        raise ImportError(
            f"Caltech's annotations are read by its loader, which lacks {error.name}; install it, "
            "or give the ground truth as a JSON file."
        ) from None
    records = load_caltech(str(root), split, check_images=False)
    return coco_ground_truth(records, protocol=protocol)


def _read_mat(
    path: str | os.PathLike, protocol: Protocol, setups: Iterable[str] | None
) -> tuple[dict[str, Any], Protocol, dict[str, Setup]]:
    if protocol.name not in _CALTECH_SPLITS:
        raise ValueError(
            f"{path} is Caltech's ground truth, and protocol {protocol.name!r} is of another "
            f"benchmark; choose one of {', '.join(_CALTECH_SPLITS)}."
        )
    match = re.fullmatch(r"gt-(.+)", Path(path).stem)
    name = match[1] if match else None
    if name not in protocol.setups:
        raise ValueError(
            f"{path} holds the boxes of one setup, which its name does not tell; name it "
            f"gt-SETUP.mat, with SETUP one of {', '.join(protocol.setups)}."
        )
    wanted = [name] if setups is None else list(setups)
    if wanted != [name]:
        raise ValueError(
            f"{path} holds the boxes of setup {name} alone, not those of {', '.join(wanted)}."
        )
    setup = protocol.setups[name]
    annotations = []
    cells = read_mat_cells(path, "gt")
    for image, rows in enumerate(cells, 1):
        for x, y, w, h, ignore in rows.tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": PEDESTRIAN,
                    "bbox": [x - 1, y - 1, w, h],  # the file counts pixels from 1
                    "height": h,
                    "vis_ratio": min(setup.visibility[0], 1),  # the flags have decided
                    "ignore": int(ignore),
                }
            )
    ground_truth = {
        "images": [{"id": image} for image in range(1, len(cells) + 1)],
        "categories": [{"id": PEDESTRIAN, "name": "pedestrian"}],
        "annotations": annotations,
    }
    check_ground_truth(ground_truth, str(path), protocol)
    return ground_truth, replace(protocol, border=None), {name: setup}


def read_mat_cells(path: str | os.PathLike, variable: str) -> list[np.ndarray]:
    """The cells of dbEval's files, one a frame.

    Args:
        path: a MATLAB file of version 7 or older.
        variable: "gt" or "dt".

    Returns:
        float64 (R, 5) of each frame: x, y, w, h, and the ignore flag or the score; pixels are
        counted from 1.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: SciPy is missing.
        ValueError: another content.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist or is not a file; check the path.")
    try:
        content = read_mat(path, variable)
        cells = [
            np.asarray(cell, dtype=np.float64).reshape(-1, 5) if np.size(cell) else np.zeros((0, 5))
            for cell in content.ravel()
        ]
    except ModuleNotFoundError:
        raise ImportError(
            f"{path} is a MATLAB file, which needs SciPy; run 'pip install scipy'."
        ) from None
    except Exception as error:  # SciPy raises a dozen types on a damaged file
        raise ValueError(
            f"{path} has no cells {variable!r} of rows of five numbers ({type(error).__name__}: "
            f"{shown(str(error))}); give a file that dbEval wrote, of MATLAB's version 7 or older."
        ) from None
    if not cells:
        raise ValueError(f"{path} has no frames; fetch it again.")
    return cells


def select_part(
    ground_truth: Mapping[str, Any], detections: list[dict[str, Any]], part: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """KAIST's images by day or by night, with their annotations and detections.

    Args:
        ground_truth: of the whole test set; images are named as ``set06/V000/I00019``.
        detections: of the whole test set.
        part: "day" (sets 06 to 08) or "night".

    Raises:
        ValueError: another part, or an image that is not named as KAIST's.
    """
    if part not in KAIST_PARTS:
        raise ValueError(f"part is {part!r}; choose one of {', '.join(KAIST_PARTS)}.")
    images = []
    for row, image in enumerate(ground_truth["images"]):
        name = image.get("im_name", image.get("file_name"))
        match = re.search(r"(set\d\d)[/_]V\d\d\d[/_]", name) if isinstance(name, str) else None
        if not match:
            raise ValueError(
                f"images[{row}] of the ground truth is named {shown(name)}; day and night are told "
                "by KAIST's names, such as set06/V000/I00019."
            )
        if (match[1] in _DAY) == (part == "day"):
            images.append(image)
    kept = {image["id"] for image in images}
    if not kept:
        raise ValueError(f"The ground truth has no image of the {part}; choose the other part.")
    annotations = [row for row in ground_truth["annotations"] if row["image_id"] in kept]
    return (
        {**ground_truth, "images": images, "annotations": annotations},
        [row for row in detections if row["image_id"] in kept],
    )
