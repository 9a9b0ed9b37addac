"""Penn-Fudan: pedestrians around two universities, a small set for trials.

Under one root folder (``PennFudanPed`` as published)::

    PNGImages/<name>.png
    Annotation/<name>.txt    PASCAL Annotation Version 1.00

The masks of PedMasks are not read. Corners are counted from 1, and the lower right one belongs to
the box. The set has no splits of its own.

Wang, Shi, Song, Shen: Object Detection Combining Recognition and Segmentation, ACCV 2007.
"""

import glob
import os
import re

from hkd_d2.data.cache import cached_records
from hkd_d2.data.datasets.formats import folder_format
from hkd_d2.data.datasets.records import check_images_exist, check_split, make_annotation
from hkd_d2.data.text_files import read_lines, shown

SPLITS = ("all",)

# Counted in the published files; the paper has 345 pedestrians, small and hidden ones came later.
PUBLISHED = {"all": {"images": 170, "rows": 423, "pedestrians": 423}}

_SIZE = re.compile(r"^Image size \(X x Y x C\) : (\d{1,9}) x (\d{1,9}) x \d+\s*$", re.MULTILINE)
_BOX = re.compile(
    r"Bounding box for object \d+ .*\(Xmin, Ymin\) - \(Xmax, Ymax\) : "
    r"\((\d{1,9}), (\d{1,9})\) - \((\d{1,9}), (\d{1,9})\)\s*"
)


@folder_format("pennfudan", SPLITS)
def load_pennfudan(root: str, split: str, *, check_images: bool = True) -> list[dict]:
    """Load Penn-Fudan. Every row counts; nothing is known of the visible share.

    Args:
        root: folder of the data set.
        split: "all".
        check_images: check that every image file exists.

    Returns:
        list[dict]: records (see :mod:`hkd_d2.data.datasets.records`) in the order of the file
        names, with the ids 1, 2, ...

    Raises:
        FileNotFoundError: a folder or an image is missing.
        ValueError: an unknown split, or a damaged file; the message names file and line.
    """
    root = check_split("Penn-Fudan", SPLITS, root, split)
    folder = os.path.join(root, "Annotation")
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.txt")))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no annotation file; the root must be the folder that has Annotation and "
            "PNGImages."
        )
    records = cached_records("pennfudan", root, paths, lambda: _read_annotations(root, paths))
    if check_images:
        check_images_exist(records, folder)
    return records


def _read_annotations(root: str, paths: list[str]) -> list[dict]:
    records = []
    for i, path in enumerate(paths, start=1):
        size, annotations = _read_annotation(path)
        name = os.path.basename(path).removesuffix(".txt")
        records.append(
            {
                "file_name": os.path.join(root, "PNGImages", f"{name}.png"),
                "image_id": i,
                "height": size[0],
                "width": size[1],
                "annotations": annotations,
            }
        )
    return records


def _read_annotation(path: str) -> tuple[tuple[int, int], list[dict]]:
    """(height, width) and rows."""
    lines = read_lines(path, "unpack the annotations there.")
    text = "\n".join(lines)
    found = _SIZE.search(text)
    objects = re.search(r"^Objects with ground truth : \d+ \{(.*)\}", text, re.MULTILINE)
    if not found or not objects:
        raise ValueError(
            f"{path}: no PASCAL annotation of version 1.00; the lines 'Image size' and 'Objects "
            "with ground truth' are expected."
        )
    size = (int(found[2]), int(found[1]))
    annotations = []
    for i, line in enumerate(lines, start=1):
        if not line.startswith("Bounding box"):
            continue
        box = _BOX.fullmatch(line)
        if not box:
            raise ValueError(
                f"{path}: line {i}: '(Xmin, Ymin) - (Xmax, Ymax) : (1, 1) - (9, 9)' is expected, "
                f"not {shown(line)}."
            )
        x1, y1, x2, y2 = map(int, box.groups())
        annotations.append(
            make_annotation(
                [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
                where=f"{path}: line {i}",
                image_size=size,
            )
        )
    # The labels in braces are counted; the number before them is not relied on.
    expected = objects[1].count('"') // 2
    if len(annotations) != expected:
        raise ValueError(
            f"{path}: {expected} objects are announced and {len(annotations)} boxes follow; the "
            "file is truncated, fetch it again."
        )
    return size, annotations
