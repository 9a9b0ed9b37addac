"""Ground truth and detections in COCO's form, checked row by row and read into arrays.

Where keys are missing, the rules of :mod:`hkd_d2.data.annotation_rules` hold, as in training. The
compiled reader (``csrc/evaluation/coco_rows.cpp``) takes ordinary rows; it leaves the others to the
functions below, which take them or refuse them by name.
"""

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from hkd_d2.data.annotation_rules import (
    ignore_flags,
    is_finite,
    pedestrian_category,
    row_height,
    visible_share,
    whole_number,
)
from hkd_d2.data.text_files import read_json, shown
from hkd_d2.evaluation.compiled import COMPILED, read_annotations, read_detections
from hkd_d2.evaluation.protocols import CITYPERSONS, CrowdHumanProtocol, Protocol, select_protocol

__all__ = [
    "PEDESTRIAN",
    "Boxes",
    "Detections",
    "GroundTruth",
    "check_box",
    "check_detections",
    "check_ground_truth",
    "detection_category",
    "ground_truth_category",
    "load_detections",
    "load_ground_truth",
    "read_both",
    "read_found",
    "read_truth",
    "rows_of_category",
]

logger = logging.getLogger(__name__)

PEDESTRIAN = 1  # the category of the benchmarks' files, and of the files that this package writes

AnyProtocol = Protocol | CrowdHumanProtocol


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of one category.

    Attributes:
        image: int64 (N,), index into the images in the order of their ids.
        box: float64 (N, 4), [x, y, w, h] in pixels.
    """

    image: np.ndarray
    box: np.ndarray


@dataclass(frozen=True, eq=False)
class GroundTruth(Boxes):
    """The pedestrians, by image, then in the order of the file.

    Attributes:
        category: the file's id of the pedestrians' category.
        image_index: index of each image id.
        image_size: float64 (I, 2), width and height, where boxes are cut; else None.
        counted_box: float64 (N, 4), in the place of ``box`` where it is countable.
        height, visibility: float64 (N,).
        occlusion, truncation: float64 (N,), where the protocol has them; else None.
        ignore: bool (N,), the file's own flags, and what no setup counts.
        region: bool (N,), ignored, it absorbs by the detection's own area.
        unmatched: bool (N,), who takes it is a false positive all the same.
    """

    category: int
    image_index: dict[int, int]
    image_size: np.ndarray | None
    counted_box: np.ndarray
    height: np.ndarray
    visibility: np.ndarray
    occlusion: np.ndarray | None
    truncation: np.ndarray | None
    ignore: np.ndarray
    region: np.ndarray
    unmatched: np.ndarray

    def take(self, rows: np.ndarray) -> "GroundTruth":
        """Those of ``rows``, indices or a mask."""
        columns = {
            name: column[rows]
            for name, column in vars(self).items()
            if isinstance(column, np.ndarray) and name != "image_size"
        }
        return replace(self, **columns)


@dataclass(frozen=True, eq=False)
class Detections(Boxes):
    """Detections of pedestrians, in the order of the file.

    Attributes:
        score: float64 (N,).
        category: their category in the file.
    """

    score: np.ndarray
    category: int

    def take(self, order: np.ndarray) -> "Detections":
        """Those of ``order``, indices."""
        return Detections(self.image[order], self.box[order], self.score[order], self.category)


# -------------------------------------------------------------------------------------- files


def load_ground_truth(
    path: str | os.PathLike, protocol: AnyProtocol | str = CITYPERSONS
) -> dict[str, Any]:
    """Read a COCO-style ground-truth file such as CityPersons' ``val_gt.json``.

    Any file that training takes will do. The pedestrians' category may have any id
    (:func:`hkd_d2.data.annotation_rules.pedestrian_category`).

    Args:
        path: a JSON object with ``images`` (each with an integer ``id``), ``categories`` and
            ``annotations``: ``image_id``, ``category_id``, ``bbox`` [x, y, w, h] in pixels and,
            by :mod:`hkd_d2.data.annotation_rules`, ``height``, ``vis_ratio``, ``ignore`` and
            ``iscrowd``. A warning says how often the first two are missing.
        protocol: whose rules it will be evaluated by, which decides what else an annotation needs:
            ``occlusion`` (KAIST: 0, 1 or 2; EuroCity: percent), ``truncation`` (percent, 0 where
            missing), ``label``; and whether images need ``width`` and ``height``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is malformed; the message names the file and the row.
    """
    ground_truth = read_json(path)
    protocol = select_protocol(protocol)
    truth = read_truth(ground_truth, str(path), protocol)
    _say_defaults(ground_truth["annotations"], truth.category, str(path), protocol)
    return ground_truth


def _say_defaults(
    annotations: list[dict[str, Any]], category: int, source: str, protocol: AnyProtocol
) -> None:
    """Warn once of defaults in the place of keys that the protocol reads."""
    rows = [row for row in annotations if row["category_id"] == category]
    defaults = {
        "height": ("height", lambda row: True, "that of the box is taken"),
        "vis_ratio": (
            "visible share",
            lambda row: row.get("vis_bbox") is None,
            "they count as wholly visible",
        ),
    }
    said = []
    for key, (noun, is_missing, instead) in defaults.items():
        missing = sum(row.get(key) is None and is_missing(row) for row in rows)
        if missing and key in protocol.annotation_keys:
            said.append(f"{missing} have no {noun}: {instead}")
    if said:
        logger.warning("%s: of %d pedestrians %s.", source, len(rows), "; ".join(said))


def check_ground_truth(
    ground_truth: Mapping[str, Any], source: str, protocol: AnyProtocol | str = CITYPERSONS
) -> None:
    """Raise ValueError, naming ``source`` and the row, where ground truth is malformed."""
    read_truth(ground_truth, source, select_protocol(protocol))


def load_detections(
    path: str | os.PathLike,
    ground_truth: Mapping[str, Any],
    protocol: AnyProtocol | str = CITYPERSONS,
) -> list[dict[str, Any]]:
    """Read detections in COCO's result format.

    Args:
        path: a JSON list of ``{"image_id", "category_id", "bbox": [x, y, w, h], "score"}``, in any
            order; it may be empty.
        ground_truth: what the detections will be evaluated against.
        protocol: by whose rules, as of :func:`load_ground_truth`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is malformed, or a detection lies in an image that the ground truth does
            not have; the message names the file and the row.
    """
    detections = read_json(path)
    check_detections(detections, ground_truth, str(path), protocol)
    return detections


def check_detections(
    detections: list[dict[str, Any]],
    ground_truth: Mapping[str, Any],
    source: str,
    protocol: AnyProtocol | str = CITYPERSONS,
) -> None:
    """Raise ValueError, naming ``source`` and the row, where detections are malformed."""
    truth = read_truth(ground_truth, "ground truth", select_protocol(protocol))
    read_found(detections, truth, source)


# --------------------------------------------------------------------------------- categories


def ground_truth_category(ground_truth: Mapping[str, Any], source: str = "ground truth") -> int:
    """Id of the pedestrians' category in ground truth that has been checked.

    Raises:
        ValueError: the file does not say which it is; the message lists the categories.
    """
    return pedestrian_category(
        ground_truth["categories"], _categories_of(ground_truth["annotations"]), source
    )


def detection_category(detections: Sequence[Mapping[str, Any]], truth_category: int) -> int:
    """Category of the detections that are pedestrians: the ground truth's, else 1.

    The files that this package writes have category 1 whatever the data set's number, so that is
    what counts where no detection has the ground truth's.
    """
    if truth_category == PEDESTRIAN or truth_category in _categories_of(detections):
        return truth_category
    return PEDESTRIAN


def rows_of_category(
    rows: Sequence[Mapping[str, Any]], category: int, labels: tuple[str, ...] | None = None
) -> np.ndarray:
    """Rows of the category, and with one of the labels where it has any; int64 (N,)."""
    return np.array(
        [
            number
            for number, row in enumerate(rows)
            if row["category_id"] == category
            and (labels is None or row.get("label", labels[0]) in labels)
        ],
        dtype=np.int64,
    )


def _categories_of(rows: Iterable[Any]) -> set[int]:
    categories = (row.get("category_id") for row in rows if isinstance(row, Mapping))
    return {category for category in categories if isinstance(category, Real)}


# ------------------------------------------------------------------------------------ arrays


def read_both(
    ground_truth: Mapping[str, Any],
    detections: list[dict[str, Any]],
    protocol: Protocol,
    compiled: bool = COMPILED,
) -> tuple[GroundTruth, Detections]:
    """Ground truth and detections as the protocol matches them.

    Raises:
        ValueError: a malformed row, by its number.
    """
    truth = read_truth(ground_truth, "ground truth", protocol, compiled)
    found = read_found(detections, truth, "detections", compiled)
    if protocol.clip_to_image:
        found = replace(found, box=_cut(found.box, truth.image_size[found.image]))
    if protocol.resize_detections:
        found = replace(found, box=_resize(found.box, protocol.aspect_ratio))
    if protocol.skip_undetected:
        truth = replace(truth, ignore=truth.ignore | ~np.isin(truth.image, found.image))
    return truth, found


def read_truth(
    ground_truth: Mapping[str, Any],
    source: str,
    protocol: AnyProtocol,
    compiled: bool = COMPILED,
) -> GroundTruth:
    """Ground truth by the rules that are the same for all setups.

    Raises:
        ValueError: malformed, naming ``source`` and the row.
    """
    if not isinstance(ground_truth, Mapping):
        raise ValueError(
            f"{source} holds a {type(ground_truth).__name__}, not an object with images, "
            "categories and annotations; check that ground truth and detections are not swapped."
        )
    for key in ("images", "categories", "annotations"):
        if not isinstance(ground_truth.get(key), list):
            raise ValueError(f"{source} has no list {key!r}; write it in COCO's format.")

    ids = []
    for row, image in enumerate(ground_truth["images"]):
        where = f"{source}: images[{row}]"
        _check_keys(image, ("id",), where)
        if not isinstance(image["id"], Integral):
            raise ValueError(f"{where} has id {shown(image['id'])}; make it an integer.")
        ids.append(int(image["id"]))
    if not ids:
        raise ValueError(f"{source} lists no images; list all of them, the empty ones too.")
    image_index = {image_id: index for index, image_id in enumerate(sorted(ids))}
    if len(image_index) < len(ids):
        raise ValueError(f"{source} uses an image id twice; number the images apart.")
    for row, category in enumerate(ground_truth["categories"]):
        where = f"{source}: categories[{row}]"
        _check_keys(category, ("id",), where)
        whole_number(category["id"], "id", where)

    annotations = ground_truth["annotations"]
    category = int(ground_truth_category(ground_truth, source))
    # The compiled reader gives None where a row is not what json.load makes of a complete one.
    columns = read_annotations(annotations, image_index, category) if compiled else None
    if columns is None:
        columns = _read_annotations(annotations, image_index, category, source)
    elif any(row.get("iscrowd") for row in annotations):  # which it leaves aside
        columns = (*columns[:4], _read_ignore(annotations, category, source))
    image, box, height, visibility, ignore = columns
    truth = GroundTruth(
        image=image,
        box=box,
        category=category,
        image_index=image_index,
        image_size=None,
        counted_box=box,
        height=height,
        visibility=visibility,
        occlusion=None,
        truncation=None,
        ignore=ignore,
        region=np.ones(len(image), dtype=bool),
        unmatched=np.zeros(len(image), dtype=bool),
    )
    if protocol.clip_to_image:
        truth = replace(truth, image_size=_image_sizes(ground_truth["images"], source))
    if isinstance(protocol, Protocol):
        truth = _apply_protocol(truth, annotations, source, protocol)
    return truth.take(np.argsort(truth.image, kind="stable"))


def _apply_protocol(
    truth: GroundTruth, annotations: list[dict[str, Any]], source: str, protocol: Protocol
) -> GroundTruth:
    """The rules that are the same for all setups; rows in the order of the file."""
    changed = {}
    category = truth.category
    if "occlusion" in protocol.annotation_keys:
        for key in ("occlusion", "truncation"):
            changed[key] = _read_column(
                annotations, key, category, source, required=key in protocol.annotation_keys
            )
    if protocol.ignored_overlap == "crowd":
        changed["region"] = _read_column(annotations, "iscrowd", category, source).astype(bool)
    if protocol.id_zero_is_unmatched:
        own = rows_of_category(annotations, category).tolist()
        changed["unmatched"] = np.array([annotations[row].get("id") == 0 for row in own], bool)
    box = truth.box
    if protocol.clip_to_image:
        box = changed["box"] = _cut(box, truth.image_size[truth.image])
        changed["height"] = box[:, 3]
    if protocol.border:
        low, high = box[:, :2], box[:, :2] + box[:, 2:]
        first, last = protocol.border[:2], protocol.border[2:]
        inside = (low >= first) & (low <= last) & (high >= first) & (high <= last)
        changed["ignore"] = truth.ignore | ~inside.all(axis=1)
    changed["counted_box"] = _resize(box, protocol.aspect_ratio) if protocol.aspect_ratio else box
    if protocol.full_visibility != 1:
        full = truth.visibility == 1
        changed["visibility"] = np.where(full, protocol.full_visibility, truth.visibility)
    truth = replace(truth, **changed)
    if protocol.labels is None:
        return truth
    stays = rows_of_category(annotations, category, protocol.labels)
    return truth.take(np.isin(rows_of_category(annotations, category), stays))


def _read_column(
    annotations: list[dict[str, Any]],
    key: str,
    category: int,
    source: str,
    required: bool = False,
) -> np.ndarray:
    """A number of 0 or more of each pedestrian, 0 where it is missing; float64."""
    values = []
    for row in rows_of_category(annotations, category).tolist():
        where = f"{source}: annotations[{row}]"
        if required:
            _check_keys(annotations[row], (key,), where)
        value = annotations[row].get(key, 0)
        if not isinstance(value, Real) or not 0 <= value <= sys.float_info.max:
            raise ValueError(f"{where} has {key} {shown(value)}; make it a number of 0 or more.")
        values.append(value)
    return np.array(values, dtype=np.float64)


def _read_ignore(annotations: list[dict[str, Any]], category: int, source: str) -> np.ndarray:
    return np.array(
        [
            any(ignore_flags(annotations[row], f"{source}: annotations[{row}]"))
            for row in rows_of_category(annotations, category).tolist()
        ],
        dtype=bool,
    )


def _image_sizes(images: list[dict[str, Any]], source: str) -> np.ndarray:
    """Width and height of the images in the order of their ids, float64 (I, 2)."""
    sizes = {}
    for row, image in enumerate(images):
        where = f"{source}: images[{row}]"
        _check_keys(image, ("width", "height"), where)
        sizes[image["id"]] = size = (image["width"], image["height"])
        if not all(is_finite(side) and side > 0 for side in size):
            raise ValueError(f"{where} has width and height {shown(size)}; make them pixels.")
    return np.array([sizes[image_id] for image_id in sorted(sizes)], dtype=np.float64)


def _cut(box: np.ndarray, image_size: np.ndarray) -> np.ndarray:
    """Boxes cut at the edges of their images; those inside keep their bits."""
    low, side = box[:, :2], box[:, 2:]
    high = low + side
    inside = (low >= 0) & (high <= image_size)
    cut_low = low.clip(min=0)
    cut_side = (np.minimum(high, image_size) - cut_low).clip(min=0)
    return np.concatenate([np.where(inside, low, cut_low), np.where(inside, side, cut_side)], 1)


def _resize(box: np.ndarray, aspect_ratio: float) -> np.ndarray:
    """Boxes of that width over height, about their centres; summed as bbApply's resize does."""
    box = box.copy()
    wider = box[:, 3] * aspect_ratio - box[:, 2]
    box[:, 0] -= wider / 2
    box[:, 2] += wider
    return box


def _read_annotations(
    annotations: list[Any], image_index: dict[int, int], category: int, source: str
) -> tuple[np.ndarray, ...]:
    """Columns of the pedestrians: image, box, height, visibility, ignore."""
    annotation_ids = set()
    image, box, height, visibility, ignore = [], [], [], [], []
    for row, annotation in enumerate(annotations):
        where = f"{source}: annotations[{row}]"
        _check_keys(annotation, ("image_id", "category_id"), where)
        _check_image(annotation["image_id"], image_index, where, "add the image or drop the row")
        annotation_id = annotation.get("id", -1 - row)
        if not isinstance(annotation_id, Integral) or annotation_id in annotation_ids:
            raise ValueError(
                f"{where} has id {shown(annotation_id)}, used twice or not an integer; renumber "
                "them."
            )
        annotation_ids.add(annotation_id)
        _check_category(annotation["category_id"], where)
        if annotation["category_id"] != category:
            continue
        _check_keys(annotation, ("bbox",), where)
        check_box(annotation["bbox"], where)
        height.append(row_height(annotation, where))
        visibility.append(visible_share(annotation, where))
        ignore.append(any(ignore_flags(annotation, where)))
        image.append(image_index[annotation["image_id"]])
        box.append(annotation["bbox"])

    return (
        np.array(image, dtype=np.int64),
        np.array(box, dtype=np.float64).reshape(-1, 4),
        np.array(height, dtype=np.float64),
        np.array(visibility, dtype=np.float64),
        np.array(ignore, dtype=bool),
    )


def read_found(
    detections: list[dict[str, Any]],
    truth: GroundTruth,
    source: str,
    compiled: bool = COMPILED,
) -> Detections:
    """Detections of pedestrians.

    Raises:
        ValueError: malformed, naming ``source`` and the row.
    """
    if not isinstance(detections, list):
        raise ValueError(
            f"{source} holds a {type(detections).__name__}, not a list of detections; write COCO's "
            "result format, and check that ground truth and detections are not swapped."
        )
    category = detection_category(detections, truth.category)
    columns = read_detections(detections, truth.image_index, category) if compiled else None
    if columns is not None:
        return Detections(*columns, category)
    image, box, score = [], [], []
    for row, detection in enumerate(detections):
        where = f"{source}: detection {row}"
        _check_keys(detection, ("image_id", "category_id", "bbox", "score"), where)
        _check_image(
            detection["image_id"], truth.image_index, where, "detect on the evaluated images only"
        )
        _check_category(detection["category_id"], where)
        check_box(detection["bbox"], where)
        if not is_finite(detection["score"]):
            score = shown(detection["score"])
            raise ValueError(f"{where} has score {score}; make it a finite number.")
        if detection["category_id"] == category:
            image.append(truth.image_index[detection["image_id"]])
            box.append(detection["bbox"])
            score.append(detection["score"])
    return Detections(
        image=np.array(image, dtype=np.int64),
        box=np.array(box, dtype=np.float64).reshape(-1, 4),
        score=np.array(score, dtype=np.float64),
        category=category,
    )


# ------------------------------------------------------------------------------------- checks


def _check_keys(row: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {shown(row)}; make it an object with {', '.join(keys)}.")
    for key in keys:
        if key not in row:
            raise ValueError(f"{where} has no {key!r}; add it.")


def _check_image(image_id: Any, image_index: dict[int, int], where: str, advice: str) -> None:
    if not isinstance(image_id, Real) or image_id not in image_index:
        raise ValueError(f"{where} lies in image {shown(image_id)}, which the set lacks; {advice}.")


def _check_category(category_id: Any, where: str) -> None:
    if not isinstance(category_id, Real):
        raise ValueError(f"{where} has category_id {shown(category_id)}; make it an integer.")


def check_box(box: Any, where: str) -> None:
    """Raise ValueError where a box is not [x, y, w, h] with sides of 0 or more."""
    if not isinstance(box, list | tuple | np.ndarray) or len(box) != 4:
        raise ValueError(f"{where} has bbox {shown(box)}; make it four numbers [x, y, w, h].")
    if not all(map(is_finite, box)):
        raise ValueError(f"{where} has bbox {shown(box)}; make its four numbers finite.")
    if box[2] < 0 or box[3] < 0:
        raise ValueError(
            f"{where} has a negative width or height in bbox {shown(box)}; give [x, y, w, h]."
        )
