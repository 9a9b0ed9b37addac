"""A picture of a data set of streets for people to look at."""

from pathlib import Path

import cv2
import numpy as np

from hkd_d2.data.streets.dataset import street_paths
from hkd_d2.data.text_files import read_json


def contact_sheet(
    root: str | Path,
    *,
    columns: int = 4,
    rows: int = 5,
    splits: tuple[str, ...] = ("train", "val"),
) -> np.ndarray:
    """Pictures of a data set of streets with their boxes drawn, side by side.

    Full boxes are green (pedestrian), orange (other persons) or grey (ignored regions); visible
    boxes are yellow where they differ.

    Args:
        root: folder written by :func:`generate_streets`.
        columns: pictures in a row.
        rows: rows; half of them of each split.
        splits: splits to take from.

    Returns:
        uint8 (H, W, 3) BGR, pictures at twice their size.
    """
    colours = {"pedestrian": (60, 220, 60), "ignore": (160, 160, 160)}
    colours["person group"] = colours["ignore"]
    files = []
    for split in splits:
        for index in range(columns * rows // len(splits)):
            files.append(street_paths(root, split, index))
    tiles = []
    for image_file, annotation_file in files:
        if not image_file.exists():
            continue
        tile = cv2.imread(str(image_file))
        tile = cv2.resize(tile, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        for row in read_json(annotation_file)["objects"]:
            boxes = [(row["bboxVis"], (60, 230, 250))] if row["bbox"] != row["bboxVis"] else []
            boxes.append((row["bbox"], colours.get(row["label"], (40, 140, 250))))
            for (x, y, w, h), colour in boxes:
                cv2.rectangle(tile, (2 * x, 2 * y), (2 * (x + w), 2 * (y + h)), colour, 1)
        tiles.append(tile)
    if not tiles:
        raise ValueError(f"{root} holds no synthetic streets to show; generate them first.")
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])
