"""CrowdHuman: people in crowds, with full, visible and head boxes (the last are not read).

Under one root folder::

    annotation_{split}.odgt    one JSON object a line: {"ID": ..., "gtboxes": [...]}
    Images/<ID>.jpg            the images of both splits

A row has the tag ``person`` or ``mask``; a mask is a crowd, a reflection or something like a
person. The official page (crowdhuman.org/download.html) is the source of
the fields.

Shao, Zhao, Li, Xiao, Yu, Zhang, Sun: CrowdHuman: A Benchmark for Detecting Human in a Crowd,
arXiv:1805.00123, 2018.
"""

import os

from hkd_d2.data.cache import cached_records
from hkd_d2.data.datasets.formats import folder_format
from hkd_d2.data.datasets.records import check_split, image_sizes, make_annotation
from hkd_d2.data.text_files import numbered_lines, parse_json, shown

SPLITS = ("train", "val")  # the annotations of test are not public

# Images: arXiv:1805.00123. Rows: a public count, not ours, of annotation_train.odgt of 80,017,502
# bytes.
PUBLISHED = {
    "train": {"images": 15000, "rows": 438792, "pedestrians": 339565},
    "val": {"images": 4370},
}


@folder_format("crowdhuman", SPLITS)
def load_crowdhuman(root: str, split: str, *, check_images: bool = True) -> list[dict]:
    """Load CrowdHuman: ``bbox`` is the full box (``fbox``), ``vis_bbox`` the visible (``vbox``).

    A mask is ``ignore``, as is a person whose ``extra`` says so; ``head_attr`` is about the head
    and says nothing of the person.

    Args:
        root: folder of the data set.
        split: one of :data:`SPLITS`.
        check_images: without effect: the sizes of the images stand in the images alone, so they
            must be there.

    Returns:
        list[dict]: records (see :mod:`hkd_d2.data.datasets.records`) in the file's order, with the
        ids 1, 2, ...

    Raises:
        FileNotFoundError: the folder, the annotation file or images are missing.
        ValueError: an unknown split, or a damaged file; the message names file, line and row.
    """
    root = check_split("CrowdHuman", SPLITS, root, split)
    path = os.path.join(root, f"annotation_{split}.odgt")
    return cached_records(f"crowdhuman-{split}", root, [path], lambda: _read(path), images=True)


def _read(path: str) -> list[dict]:
    images: dict[str, tuple[int, list]] = {}
    for i, line in numbered_lines(path, "put it into the folder that has Images."):
        content = parse_json(line, f"{path}: line {i}")
        if not isinstance(content, dict):
            content = {}
        name, rows = content.get("ID"), content.get("gtboxes")
        if not isinstance(name, str) or not isinstance(rows, list):
            raise ValueError(
                f"{path}: line {i} has no text 'ID' and list 'gtboxes'; fetch the file again."
            )
        if name in images:
            raise ValueError(
                f"{path}: line {i}: the ID {shown(name)} stands twice; remove one line."
            )
        images[name] = (i, rows)
    if not images:
        raise ValueError(f"{path}: the file is empty; fetch it again.")

    folder = os.path.join(os.path.dirname(path), "Images")
    names = [os.path.join(folder, f"{name}.jpg") for name in images]
    return [
        {
            "file_name": name,
            "image_id": i,
            "height": size[0],
            "width": size[1],
            "annotations": [
                _annotation(row, f"{path}: line {line}: gtboxes[{j}]", size)
                for j, row in enumerate(rows)
            ],
        }
        for i, (name, size, (line, rows)) in enumerate(
            zip(names, image_sizes(names, path), images.values(), strict=True), start=1
        )
    ]


def _annotation(row, where: str, size: tuple[int, int]) -> dict:
    tag, extra = (row.get("tag"), row.get("extra", {})) if isinstance(row, dict) else (None, None)
    if tag not in ("person", "mask") or not isinstance(extra, dict):
        raise ValueError(f"{where}: a row has the tag person or mask, and 'extra' is an object.")
    ignore = 1 if tag == "mask" else extra.get("ignore", 0)
    boxes = [row.get("fbox"), row.get("vbox")]
    if ignore == 1:  # such rows may have negative sizes; they cover nothing
        boxes = [_without_negative_size(box) for box in boxes]
    bbox, vis_bbox = boxes
    annotation = make_annotation(
        bbox, where=where, image_size=size, ignore=ignore, vis_bbox=vis_bbox
    )
    return {**annotation, "label": tag}


def _without_negative_size(box):
    if not isinstance(box, list) or not all(isinstance(v, int | float) for v in box):
        return box  # make_annotation refuses it
    return [*box[:2], *(max(v, 0) for v in box[2:])]
