"""EuroCity Persons (ECP): pedestrians and riders in 31 European cities, by day and by night.

Under one root folder (``ECP`` as published), for ``time`` day and night::

    {time}/img/{split}/<city>/<stem>.png
    {time}/labels/{split}/<city>/<stem>.json

A JSON file is one frame: imageheight, imagewidth and children, each with identity, x0, y0, x1, y1,
tags and children of its own: a rider's vehicle. The benchmark's evaluation code is the source of
what is ignored (tools/ECPB of github.com/hasanirtiza/Pedestron, commit 28b7202, params.py).

Braun, Krebs, Flohr, Gavrila: EuroCity Persons: A Novel Benchmark for Person Detection in Traffic
Scenes, TPAMI 2019.
"""

import glob
import os
import re

from hkd_d2.data.cache import cached_records
from hkd_d2.data.datasets.formats import folder_format
from hkd_d2.data.datasets.records import (
    check_images_exist,
    check_split,
    image_size_of,
    make_annotation,
)
from hkd_d2.data.text_files import read_json, shown

# The labels of test are not public.
SPLITS = ("day_train", "day_val", "night_train", "night_val")

VEHICLES = ("bicycle", "buggy", "motorbike", "scooter", "tricycle", "wheelchair")
# Neither object nor ignore region: a detection there is a mistake like any other.
NO_PERSON = {*VEHICLES, *(f"{vehicle}-group" for vehicle in VEHICLES)}
GROUPS = {"person-group-far-away", "rider+vehicle-group-far-away"}
# Tags of a pedestrian whom the benchmark does not count.
IGNORED_TAGS = {"sitting-lying", "behind-glass"}


@folder_format("eurocity", SPLITS)
def load_eurocity(root: str, split: str, *, check_images: bool = True) -> list[dict]:
    """Load EuroCity Persons.

    Pedestrians count, but for those that sit, lie or are behind glass. Riders, groups and any
    other identity are ``ignore``, groups ``iscrowd`` too. Vehicles are no persons and left out,
    after the same checks.

    ``occlusion`` and ``truncation`` are the lower bounds in percent that the tags give (0 without a
    tag, 40 for ``occluded>40``), and ``vis_ratio`` is the upper bound that follows from the larger
    one: 1, 0.9, 0.6 or 0.2. ``label`` is the identity, as the file writes it.

    Args:
        root: folder with ``day`` and ``night``.
        split: one of :data:`SPLITS`.
        check_images: check that every image file exists.

    Returns:
        list[dict]: records (see :mod:`hkd_d2.data.datasets.records`) in the order of city and file
        name, with the ids 1, 2, ...

    Raises:
        FileNotFoundError: a folder or an image is missing.
        ValueError: an unknown split, or a damaged file; the message names file and row.
    """
    root = check_split("EuroCity Persons", SPLITS, root, split)
    time, part = split.split("_")
    labels, images = (os.path.join(root, time, kind, part) for kind in ("labels", "img"))
    paths = sorted(glob.glob(os.path.join(glob.escape(labels), "*", "*.json")))
    if not paths:
        raise FileNotFoundError(
            f"{labels}: no file <city>/*.json; unpack the labels there, under the folder that has "
            "day and night."
        )
    records = cached_records(
        f"eurocity-{split}", root, paths, lambda: _read_frames(labels, images, paths)
    )
    if check_images:
        check_images_exist(records, labels)
    return records


def _read_frames(labels: str, images: str, paths: list[str]) -> list[dict]:
    """Records of the label files ``paths`` below ``labels``; their images lie below ``images``."""
    records = []
    for i, path in enumerate(paths, start=1):
        frame = read_json(path)
        if not isinstance(frame, dict):
            frame = {}
        if frame.get("identity") != "frame":
            raise ValueError(
                f"{path}: no label file of EuroCity Persons; its identity must be 'frame'."
            )
        size = image_size_of(frame, ("imageheight", "imagewidth"), path)
        stem = os.path.relpath(path, labels).removesuffix(".json")
        records.append(
            {
                "file_name": os.path.join(images, f"{stem}.png"),
                "image_id": i,
                "height": size[0],
                "width": size[1],
                "annotations": _read_children(frame, path + ": ", size),
            }
        )
    return records


def _read_children(parent: dict, where: str, size: tuple[int, int]) -> list[dict]:
    """The persons among the children of ``parent`` and below, each before its own children."""
    children = parent.get("children", [])
    if not isinstance(children, list):
        raise ValueError(f"{where}children must be a list, not {shown(children)}.")
    annotations = []
    for i, row in enumerate(children):
        inner = f"{where}children[{i}]"
        try:
            label, tags = row["identity"], row.get("tags", [])
            if not isinstance(label, str | None) or not isinstance(tags, list):
                raise TypeError
            x0, y0, x1, y1 = (float(row[key]) for key in ("x0", "y0", "x1", "y1"))
            occlusion, truncation = (_percent(tags, word) for word in ("occluded", "truncated"))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise ValueError(
                f"{inner}: identity, the numbers x0, y0, x1, y1 and a list of tags are expected."
            ) from None
        counts = label == "pedestrian" and not IGNORED_TAGS.intersection(tags)
        annotation = make_annotation(
            [x0, y0, x1 - x0, y1 - y0],
            where=inner,
            image_size=size,
            ignore=not counts,
            iscrowd=label in GROUPS,
            vis_ratio=1 - max(occlusion, truncation) / 100,
        )
        if label not in NO_PERSON:
            annotations.append(
                {**annotation, "label": label, "occlusion": occlusion, "truncation": truncation}
            )
        annotations += _read_children(row, inner + ".", size)
    return annotations


def _percent(tags: list[str], word: str) -> int:
    """The largest number of the tags ``word>number``, 0 without one."""
    found = (re.fullmatch(rf"{word}>(\d+)", tag) for tag in tags)
    return max((int(match[1]) for match in found if match), default=0)
