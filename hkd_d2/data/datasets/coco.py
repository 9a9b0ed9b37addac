"""Any annotation file in COCO's JSON form, with the keys of pedestrian data where it has them."""

import os

from detectron2.data import MetadataCatalog

from hkd_d2.data.annotation_rules import ignore_flags, row_height, visible_share, whole_number
from hkd_d2.data.datasets.records import check_images_exist, make_annotation
from hkd_d2.data.text_files import read_json, shown

# How much of a body is hidden, where a benchmark says it in steps of its own (see records.py).
HIDDEN = ("occlusion", "truncation")


def read_coco(json_file: str) -> dict:
    """Read a COCO JSON file as it is.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: no JSON, or without one of the lists images, annotations, categories.
    """
    data = read_json(json_file)
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise ValueError(f"{json_file}: no COCO annotation file, it has no list '{key}'.")
    return data


def load_coco(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    *,
    check_images: bool = True,
) -> list[dict]:
    """Load boxes from a COCO JSON file.

    Beyond COCO's keys an image may name its file ``im_name`` instead of ``file_name``, and an
    annotation may carry ``ignore``, ``vis_bbox``, ``vis_ratio`` and ``height``, by the rules of
    :mod:`hkd_d2.data.annotation_rules`, and ``occlusion`` and ``truncation`` (int). Segmentations
    and keypoints are not read.

    The categories become the classes 0, 1, ... in the order of their ids. A file in which every
    annotation has category_id 1 has that one class, as CityPersons' evaluation files do: they list
    six categories and tell pedestrians from the others by ``ignore``.

    Args:
        json_file: the annotation file.
        image_root: folder to which the images' names are relative.
        dataset_name: where given, ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` of
            this data set's metadata are set.
        check_images: check that every image file exists.

    Returns:
        list[dict]: records (see :mod:`hkd_d2.data.datasets.records`) in the file's order, with the
        file's image ids; images without annotations included.

    Raises:
        FileNotFoundError: the annotation file or an image is missing.
        ValueError: the file is damaged or no COCO JSON; the message names file and row.
    """
    data = read_coco(json_file)
    if not data["images"]:
        raise ValueError(f"{json_file}: the list of images is empty; nothing to train or test on.")

    records = {}
    for i, image in enumerate(data["images"]):
        where = f"{json_file}: images[{i}]"
        image_id, height, width = (
            _get(image, key, int, where) for key in ("id", "height", "width")
        )
        if height <= 0 or width <= 0:
            raise ValueError(f"{where}: height and width must be positive, not {height}, {width}.")
        if image_id in records:
            raise ValueError(f"{where}: image id {image_id} is used twice; ids must be unique.")
        name = _get(image, "file_name" if "file_name" in image else "im_name", str, where)
        records[image_id] = {
            "file_name": os.path.join(image_root, name),
            "image_id": image_id,
            "height": height,
            "width": width,
            "annotations": [],
        }

    names = {}
    for i, category in enumerate(data["categories"]):
        where = f"{json_file}: categories[{i}]"
        names[_get(category, "id", int, where)] = _get(category, "name", str, where)
    rows = [
        (_get(row, "category_id", int, f"{json_file}: annotations[{i}]"), row)
        for i, row in enumerate(data["annotations"])
    ]
    if {category_id for category_id, _ in rows} == {1} and 1 in names:
        names = {1: names[1]}
    contiguous = {category_id: i for i, category_id in enumerate(sorted(names))}

    for i, (category_id, row) in enumerate(rows):
        where = f"{json_file}: annotations[{i}]"
        image_id = _get(row, "image_id", int, where)
        if image_id not in records:
            raise ValueError(f"{where}: image_id {image_id} is not in the list of images.")
        if category_id not in contiguous:
            raise ValueError(
                f"{where}: category_id {category_id} is not in the list of categories."
            )
        record = records[image_id]
        ignore, iscrowd = ignore_flags(row, where)
        annotation = make_annotation(
            _get(row, "bbox", list, where),
            where=where,
            image_size=(record["height"], record["width"]),
            category_id=contiguous[category_id],
            ignore=ignore,
            iscrowd=iscrowd,
            vis_bbox=row.get("vis_bbox"),
            vis_ratio=row.get("vis_ratio"),
        )
        annotation["vis_ratio"] = float(visible_share(row, where))
        height = row_height(row, where)
        if height != annotation["bbox"][3]:  # evaluation reads the file's
            annotation["height"] = float(height)
        for key in HIDDEN:
            if key in row:
                annotation[key] = _get(row, key, int, where)
        record["annotations"].append(annotation)

    records = list(records.values())
    if check_images:
        check_images_exist(records, json_file)
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).set(
            thing_classes=[names[category_id] for category_id in contiguous],
            thing_dataset_id_to_contiguous_id=contiguous,
        )
    return records


def to_coco(records: list[dict], root: str) -> dict:
    """Records as the content of a COCO JSON file that :func:`load_coco` and evaluation read.

    For data of the one class pedestrian. Ids of annotations are 1, 2, ... in row order; images are
    named relative to the folder ``root``; whole numbers are written as such, and ``vis_ratio`` with
    twelve significant digits, as the official evaluation files have them.
    """
    annotations = []
    for record in records:
        for row in record["annotations"]:
            boxes = {
                key: [_whole(v) for v in row[key]] for key in ("bbox", "vis_bbox") if key in row
            }
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": 1,
                    "iscrowd": row["iscrowd"],
                    "ignore": row["ignore"],
                    **boxes,
                    "height": row.get("height", boxes["bbox"][3]),
                    "vis_ratio": _whole(float(f"{row['vis_ratio']:.12g}")),
                    **{key: row[key] for key in HIDDEN if key in row},
                }
            )
    images = [
        {
            "id": r["image_id"],
            "file_name": os.path.relpath(r["file_name"], root).replace(os.sep, "/"),
            "height": r["height"],
            "width": r["width"],
        }
        for r in records
    ]
    categories = [{"id": 1, "name": "pedestrian"}]
    return {"categories": categories, "images": images, "annotations": annotations}


def _whole(value: float):
    return int(value) if value == int(value) else value


def _get(row, key: str, kind: type, where: str):
    value = row.get(key) if isinstance(row, dict) else None
    if kind is int and isinstance(value, float):  # some programs write 192.0
        return whole_number(value, key, where)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: '{key}' is missing or no {kind.__name__}: {shown(value)}.")
    return value
