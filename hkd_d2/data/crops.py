"""Crops of objects and of background, cut from detection data sets to pre-train a classifier on."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image
from tqdm import tqdm

from hkd_d2.data.images import read_data_image
from hkd_d2.data.mapper import is_ignored

BACKGROUND = "background"
# Ours: a background crop may cover this share of a row, or a row this share of the crop.
MAX_OVERLAP = 0.1
# Ours: image, size and place are drawn so often before a background crop is given up.
TRIES = 1000


@dataclass(frozen=True)
class Crop:
    """A square of an image and its class.

    Attributes:
        image: index of the record.
        x, y, side: left, top and side, pixels; it may leave the image.
        label: the name of its class, or "background".
    """

    image: int
    x: int
    y: int
    side: int
    label: str


def plan_crops(
    records: list[dict],
    class_names: list[str],
    *,
    min_height: float,
    min_visibility: float,
    context: float,
    background: float,
    seed: int,
) -> list[Crop]:
    """Choose a square around every object that training counts, and squares of background.

    A background square is that of the size of a random object's box, at a random place in a random
    image, where it has at most a tenth in common with every row, also with those to be ignored: the
    intersection over the smaller of square and row, so that neither a crowd's middle nor a square
    with a small person in it passes.

    Args:
        records: see :mod:`hkd_d2.data.datasets.records`.
        class_names: of the records' classes.
        min_height, min_visibility: which objects count, see :func:`hkd_d2.data.mapper.is_ignored`.
        context: what is added on every side, as a share of the box's longer side.
        background: crops of the background for each object.
        seed: of the generator that draws them.

    Returns:
        list[Crop]: in the order of the images, objects first.

    Raises:
        ValueError: a class without an object, or no room for the background.
    """
    if BACKGROUND in class_names:
        raise ValueError(
            "A class is named 'background'; rename it, since the others need the name."
        )
    rows = [
        np.array(
            [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in r["annotations"]]
        ).reshape(-1, 4)
        for r in records
    ]
    crops, sizes = [], []
    for image, record in enumerate(records):
        for row, annotation in zip(rows[image], record["annotations"], strict=True):
            if not is_ignored(annotation, min_height, min_visibility):
                label = class_names[annotation["category_id"]]
                crops.append(Crop(image, *square(row, context), label))
                sizes.append(row[2:])
    empty = sorted(set(class_names) - {crop.label for crop in crops})
    if empty:
        raise ValueError(
            f"no object of the class '{empty[0]}' counts; lower HKD.DATA.MIN_HEIGHT or "
            "HKD.DATA.MIN_VISIBILITY, or choose another data set."
        )
    generator = np.random.default_rng(seed)
    for _ in range(round(background * len(sizes))):
        crops.append(draw_background(records, rows, sizes, context, generator))
    return sorted(crops, key=lambda crop: crop.image)  # stable


def draw_background(records, rows, sizes, context, generator) -> Crop:
    """One square of background; see :func:`plan_crops`."""
    for _ in range(TRIES):
        image = int(generator.integers(len(records)))
        size = sizes[generator.integers(len(sizes))]
        room = np.array([records[image]["width"], records[image]["height"]]) - size
        place = generator.random(2) * room
        crop = Crop(image, *square(np.concatenate([place, size]), context), BACKGROUND)
        if room.min() >= 0 and overlap(crop, rows[image]) <= MAX_OVERLAP:
            return crop
    raise ValueError(
        f"in {TRIES} tries no place for a background crop was found that no row covers; lower "
        "--background or add images with fewer people."
    )


def square(box: np.ndarray, context: float) -> tuple[int, int, int]:
    """Left, top and side (pixels) of the square around a box [x, y, w, h], with context."""
    side = max(1, round(float(box[2:].max() * (1 + 2 * context))))
    x, y = np.round(box[:2] + box[2:] / 2 - side / 2).astype(int).tolist()
    return x, y, side


def overlap(crop: Crop, rows: np.ndarray) -> float:
    """The largest intersection with a row (R, 4) [x, y, w, h], over the smaller of both areas."""
    rows = rows[(rows[:, 2:] > 0).all(1)]  # others cover nothing
    if len(rows) == 0:
        return 0.0
    start = np.array([crop.x, crop.y])
    low, high = rows[:, :2], rows[:, :2] + rows[:, 2:]
    common = np.clip(np.minimum(high, start + crop.side) - np.maximum(low, start), 0, None)
    smaller = np.minimum(rows[:, 2:].prod(1), crop.side**2)
    return float((common.prod(1) / smaller).max())


def cut(image: np.ndarray, crop: Crop, size: int) -> Image.Image:
    """The crop of an image (H, W, 3) uint8, its border repeated outside, at most ``size`` wide."""
    rows, columns = (
        np.clip(np.arange(start, start + crop.side), 0, length - 1)
        for start, length in zip((crop.y, crop.x), image.shape[:2], strict=True)
    )
    found = Image.fromarray(np.ascontiguousarray(image[rows[:, None], columns]))
    if crop.side > size:
        found = found.resize((size, size), Image.Resampling.BILINEAR)
    return found


def check_crop_target(folder: str | os.PathLike) -> None:
    """Raise ValueError where ``folder`` is there and is not empty."""
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ValueError(f"'{folder}' is there already; name a folder that is empty or not there.")


def write_crops(
    folder: str | os.PathLike, splits: dict[str, tuple[list[dict], list[Crop]]], size: int
) -> None:
    """Write ``<split>/<class>/<image>_<crop>.png`` whole or not at all, with a line of progress.

    Args:
        folder: empty or not there.
        splits: records and crops of each split, "train" and "val".
        size: larger crops are made smaller to it, pixels.

    Raises:
        ValueError: the folder holds something, or an image cannot be read.
    """
    check_crop_target(folder)
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, (records, crops) in splits.items():
            for label in {crop.label for crop in crops}:
                (partial / split / label).mkdir(parents=True)
            seen = None
            for number, crop in enumerate(tqdm(crops, desc=split, unit="crop")):
                if crop.image != seen:
                    seen, image = crop.image, read_data_image(records[crop.image]["file_name"])
                name = f"{crop.image:06}_{number:07}.png"
                cut(image, crop, size).save(partial / split / crop.label / name)
        partial.chmod(0o755)  # a temporary folder is its maker's alone
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
