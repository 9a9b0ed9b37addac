"""Dataset records: what every loader of this package returns, and the checks they share.

A data set is a list of records, one dict an image, in Detectron2's dataset format:

- ``file_name`` (str), ``image_id`` (int), ``height``, ``width`` (int, pixels)
- ``annotations`` (list[dict]), one for every row of the file but those of vehicles and other things
  that are no persons: a detection there is a mistake like any other

  - ``bbox`` (list[float]): full body, [x, y, w, h] in pixels; it may leave the image. Never whole
    numbers (int), which Detectron2's transforms would round down
  - ``bbox_mode``: ``BoxMode.XYWH_ABS``
  - ``category_id`` (int): index of the class
  - ``iscrowd`` (0 or 1): a group of people
  - ``ignore`` (0 or 1): the file's own flag; what training ignores besides is the mapper's business
  - ``vis_ratio`` (float): visible share of the body, 1.0 where the file does not tell
  - ``vis_bbox`` (list[float], where the file has it): visible part, [x, y, w, h]; all zero where
    nothing is known of it
  - ``label`` (int or str, where the file has it): the file's own class
  - ``occlusion`` (int, KAIST only): 0 none, 1 partial, 2 heavy
  - ``occlusion``, ``truncation`` (int, EuroCity Persons only): at least so many percent of the body
    are hidden, or outside the image; 0, 10, 40 or 80
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from detectron2.structures import BoxMode

from hkd_d2.data.annotation_rules import whole_number
from hkd_d2.data.image_files import image_size
from hkd_d2.data.text_files import shown, shown_path


def check_split(name: str, splits: tuple[str, ...], root: str, split: str) -> str:
    """Check that the data set ``name`` has this split and that its folder exists.

    Returns:
        str: the folder's absolute path.

    Raises:
        ValueError: an unknown split.
        FileNotFoundError: no such folder.
    """
    if split not in splits:
        noun = "split" if len(splits) == 1 else "splits"
        raise ValueError(f"{name} has the {noun} {', '.join(splits)}, not '{split}'.")
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"{root}: no such folder; put {name} there or set DETECTRON2_DATASETS or "
            "HKD.DATA.REGISTER to where it is."
        )
    return os.path.abspath(root)


def image_size_of(content: dict, keys: tuple[str, str], where: str) -> tuple[int, int]:
    """(height, width) in pixels from two keys of a file.

    Raises:
        ValueError: one of them is no positive whole number; ``where`` names the file.
    """
    height, width = (whole_number(content.get(key), f"'{key}'", where) for key in keys)
    if min(height, width) <= 0:
        raise ValueError(f"{where}: {' and '.join(keys)} must be positive, not {height}, {width}.")
    return height, width


def visible_ratio(bbox: list[float], vis_bbox: list[float]) -> float:
    """Visible share of a body: area of ``vis_bbox`` over area of ``bbox`` (both [x, y, w, h])."""
    area = bbox[2] * bbox[3]
    return vis_bbox[2] * vis_bbox[3] / area if area > 0 else 0.0


def make_annotation(
    bbox,
    *,
    where: str,
    image_size: tuple[int, int],
    category_id: int = 0,
    ignore=0,
    iscrowd=0,
    vis_bbox=None,
    vis_ratio=None,
) -> dict:
    """Check one row and put it in the form of this module's docstring.

    Boxes that leave the image in part are kept as they are; the mapper clips them. Boxes without an
    area, or wholly outside the image, are kept where the row is ignored (they cover nothing) and
    refused elsewhere.

    Args:
        bbox, vis_bbox: [x, y, w, h] in pixels.
        where: names file and row in error messages.
        image_size: (height, width) in pixels.
        vis_ratio: computed from ``vis_bbox`` where None.

    Raises:
        ValueError: a box that is not four finite numbers with w, h >= 0, a flag that is not 0 or 1,
            or a countable row without a box inside the image.
    """
    boxes = {"bbox": bbox} if vis_bbox is None else {"bbox": bbox, "vis_bbox": vis_bbox}
    for key, box in boxes.items():
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
            raise ValueError(
                f"{where}: {key} must be four finite numbers [x, y, w, h], not {shown(box)}."
            )
        if box[2] < 0 or box[3] < 0:
            raise ValueError(f"{where}: {key} {box} has a negative width or height.")
        boxes[key] = [float(v) for v in box]
    for key, flag in (("ignore", ignore), ("iscrowd", iscrowd)):
        if flag not in (0, 1):
            raise ValueError(f"{where}: {key} must be 0 or 1, not {shown(flag)}.")

    bbox = boxes["bbox"]
    x, y, w, h = bbox
    height, width = image_size
    inside = w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0
    if not (inside or ignore or iscrowd):
        raise ValueError(
            f"{where}: bbox {bbox} has no area inside the {width}x{height} image; correct the box "
            "or mark the row ignore."
        )
    if vis_ratio is None:
        vis_ratio = visible_ratio(bbox, boxes["vis_bbox"]) if vis_bbox is not None else 1.0
    elif not _is_finite(vis_ratio):
        raise ValueError(f"{where}: vis_ratio must be a finite number, not {shown(vis_ratio)}.")
    return {
        **boxes,
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category_id,
        "iscrowd": int(iscrowd),
        "ignore": int(ignore),
        "vis_ratio": float(vis_ratio),
    }


def check_images_exist(records: list[dict], source: str) -> None:
    """Check that the images of ``records`` exist; ``source`` names the annotations in the message.

    Raises:
        FileNotFoundError: images are missing.
    """
    missing = [r["file_name"] for r in records if not os.path.isfile(r["file_name"])]
    if missing:
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {len(records)} images are missing, the first is "
            f"{shown_path(missing[0])}; put the images there or correct the image folder."
        )


def image_sizes(paths: list[str], source: str) -> list[tuple[int, int]]:
    """(height, width) of each image, as Detectron2 reads it, for annotations that do not state it.

    Args:
        paths: of the images.
        source: names the annotations in messages.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: a file is no image.
    """
    check_images_exist([{"file_name": path} for path in paths], source)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(image_size, paths))


def _is_finite(value) -> bool:
    # As a comparison: math.isfinite raises at integers over the range of floats.
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max
