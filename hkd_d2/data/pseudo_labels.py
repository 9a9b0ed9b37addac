"""Files of pseudo-labels: images with a teacher's detections as their labels, and their origin.

A file of pseudo-labels is a COCO JSON file. Beyond COCO's keys

- an annotation has ``score``, the detection's;
- ``categories`` is the teacher's class list, with ids 1, 2, ... in the order of its classes;
- ``info`` says where the labels come from: ``format`` (:data:`FORMAT`), ``teacher_config`` and
  ``teacher_options`` (as given), ``teacher_weights`` (path), ``teacher_sha256`` (of that file),
  ``score_threshold`` (detections above it), ``date_created`` (UTC), ``tool``, and ``image_root``,
  the folder to which file names are relative.
"""

import hashlib
import json
import os
from dataclasses import dataclass

from detectron2.structures import BoxMode, Instances
from detectron2.utils.file_io import PathManager

from hkd_d2.data.datasets.coco import load_coco, read_coco
from hkd_d2.files import written_beside

FORMAT = "hkd_d2 pseudo-labels"
FORMATS = (FORMAT, "hkd_d2 pseudo-label pool")  # also that of files made before 0.1.0
_INFO = {"teacher_sha256": str, "score_threshold": (int, float), "image_root": str}


@dataclass
class PseudoLabels:
    """A file of pseudo-labels as it was read.

    Attributes:
        path: its file.
        info: where the labels come from.
        classes: the teacher's class list.
        records: see :mod:`hkd_d2.data.datasets.records`; images without a detection
            included, ``category_id`` an index of ``classes``.
    """

    path: str
    info: dict
    classes: list[str]
    records: list[dict]


def file_sha256(path: str) -> str:
    """SHA-256 of a file, or of what a URL that Detectron2 knows stands for, in hexadecimal.

    Raises:
        FileNotFoundError: no such file.
    """
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"The weights '{path}' do not exist; give an existing file.")
    with open(PathManager.get_local_path(path), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def make_pseudo_labels(
    records: list[dict], detections: list[Instances], classes: list[str], info: dict
) -> dict:
    """Put detections into the form of a file of pseudo-labels.

    Args:
        records: of the images, see :mod:`hkd_d2.data.datasets.records`; annotations are not read.
        detections: for each record, on the CPU: ``pred_boxes`` (Boxes, (R, 4) float32 XYXY in
            pixels of the original image), ``scores`` ((R,) float32), ``pred_classes`` ((R,) int64).
        classes: the teacher's class list.
        info: keys of ``info`` beside ``format`` and ``image_root``.

    Returns:
        dict: ready for JSON.
    """
    files = [os.path.abspath(r["file_name"]) for r in records]
    root = os.path.commonpath([os.path.dirname(f) for f in files]) if files else ""
    images, annotations = [], []
    for record, file, found in zip(records, files, detections, strict=True):
        images.append(
            {
                "id": record["image_id"],
                "file_name": os.path.relpath(file, root),
                "height": record["height"],
                "width": record["width"],
            }
        )
        boxes = BoxMode.convert(found.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        for box, score, label in zip(
            boxes.tolist(), found.scores.tolist(), found.pred_classes.tolist(), strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": label + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return {
        "info": {"format": FORMAT, **info, "image_root": root},
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
        "images": images,
        "annotations": annotations,
    }


def check_pseudo_label_target(path: str) -> None:
    """Check that pseudo-labels may be written to ``path``: nothing is there, or pseudo-labels.

    Raises:
        ValueError: something else is there.
    """
    if not os.path.lexists(path):
        return
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        is_ours = content["info"]["format"] in FORMATS
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} is there already and holds no pseudo-labels; name another file.")


def write_pseudo_labels(path: str, pseudo: dict) -> None:
    """Write pseudo-labels whole or not at all; their folder is made where it is missing.

    Raises:
        ValueError: ``path`` holds something else.
    """
    check_pseudo_label_target(path)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with written_beside(path) as part, open(part, "w", encoding="utf-8") as f:
        json.dump(pseudo, f)


def read_pseudo_labels(path: str) -> PseudoLabels:
    """Read and check a file of pseudo-labels.

    Raises:
        FileNotFoundError: the file or an image is missing.
        ValueError: the file is damaged, holds no pseudo-labels, or has no image or no detection.
    """
    data = read_coco(path)
    info = data.get("info")
    if not isinstance(info, dict) or info.get("format") not in FORMATS:
        raise ValueError(
            f"{path}: no pseudo-labels, its info does not say so; make one with hkd label."
        )
    for key, kind in _INFO.items():
        if not isinstance(info.get(key), kind):
            raise ValueError(
                f"{path}: the file is damaged, its info has no '{key}'; make it again with "
                "hkd label."
            )
    if [c.get("id") for c in data["categories"]] != list(range(1, len(data["categories"]) + 1)):
        raise ValueError(
            f"{path}: the file is damaged, its categories are not numbered 1, 2, ...; make it "
            "again with hkd label."
        )
    if not data["images"] or not data["annotations"]:
        raise ValueError(
            f"{path}: the file is empty, {len(data['images'])} images and "
            f"{len(data['annotations'])} detections; make it again from images with objects or "
            "with a lower --score-threshold."
        )
    records = load_coco(path, info["image_root"])
    return PseudoLabels(path, info, [c["name"] for c in data["categories"]], records)


def check_pseudo_label_teacher(pseudo: PseudoLabels, weights: str, sha256: str) -> None:
    """Check that the teacher of the run made the file.

    Args:
        weights: ``HKD.TEACHER.WEIGHTS``, for the sentence; ``sha256``: of that file.

    Raises:
        ValueError: another teacher made it.
    """
    if pseudo.info["teacher_sha256"] != sha256:
        raise ValueError(
            f"{pseudo.path}: the file was made by another teacher (sha256 "
            f"{pseudo.info['teacher_sha256'][:12]}...) than HKD.TEACHER.WEIGHTS '{weights}' "
            f"({sha256[:12]}...); make it again with hkd label or name its teacher."
        )


def in_classes_of(pseudo: PseudoLabels, classes: list[str], class_map: list[int]) -> list[dict]:
    """The records of a file, in the classes of the student.

    Args:
        classes: of the labelled training sets.
        class_map: ``HKD.TEACHER.CLASS_MAP``, [] where the class lists are the same. Detections of
            classes that it does not name are dropped.

    Raises:
        ValueError: other classes without a map, or a map that does not fit the file's.
    """
    if not class_map and pseudo.classes != list(classes):
        raise ValueError(
            f"{pseudo.path}: the file has the classes {', '.join(pseudo.classes)} and "
            f"DATASETS.TRAIN {', '.join(classes)}; set HKD.TEACHER.CLASS_MAP to the index of "
            "each student class in the file's list."
        )
    class_map = list(class_map) or list(range(len(classes)))
    if len(class_map) != len(classes) or not all(0 <= c < len(pseudo.classes) for c in class_map):
        raise ValueError(
            f"{pseudo.path}: HKD.TEACHER.CLASS_MAP {class_map} does not fit {len(classes)} student "
            f"classes and the {len(pseudo.classes)} of the file; give one index from 0 to "
            f"{len(pseudo.classes) - 1} for each student class."
        )
    return [
        {
            **record,
            "annotations": [
                {**row, "category_id": class_map.index(row["category_id"])}
                for row in record["annotations"]
                if row["category_id"] in class_map
            ],
        }
        for record in pseudo.records
    ]
