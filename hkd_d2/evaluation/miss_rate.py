"""Log-average miss rate (MR^-2) of pedestrian detections, as the CityPersons benchmark computes it.

Needs NumPy alone. The numbers equal those of the benchmark's evaluation script (Zhang, Benenson and
Schiele, "CityPersons", CVPR 2017; github.com/cvgroup-njust/CityPersons, ``eval_script``), which
follows the Caltech protocol (Dollar et al., "Pedestrian Detection: An Evaluation of the State of
the Art", PAMI 2012). Other benchmarks change some of the steps:
:class:`hkd_d2.evaluation.protocols.Protocol` names each change. One setup is evaluated like this:

1.  Ground truth of category 1. A box whose height or visible share lies outside the setup's range
    is ignored, as are those that the file itself marks ``ignore``.
2.  Detections of category 1, by image id, then in the order of the file.
3.  Per image: sorted by falling score (stable), cut to the first 1,000, *then* those with a height
    under ``low / 1.25`` or from ``high * 1.25`` up are dropped.
4.  Overlap of continuous boxes: intersection over union with a countable box, intersection over the
    detection's own area with an ignored one.
5.  In score order, a detection takes the countable box, not yet taken, of largest overlap >= 0.5
    (of equals, the later in the file) and is a true positive. Failing that, an ignored box with
    overlap >= 0.5 absorbs it, any number of times, and it does not count. Otherwise it is a false
    positive.
6.  All images together, sorted by falling score (stable): FPPI is the number of false positives
    over the number of images in the ground truth, empty ones included; miss is one minus recall.
7.  At nine values of FPPI from 0.01 to 1 the last operating point that does not exceed the value is
    read, and MR^-2 is the geometric mean of the nine misses.

The steps are written below in NumPy and plain Python, which is the definition ("reference").
Where ``hkd_d2._native`` is compiled, its C++ (``csrc/evaluation``, "native") repeats them to the
last bit, all setups in one pass.

One difference: the published script counts a match with the annotation of ``id`` 0 as a false
positive. Annotation ids play no part here, so files that number from 0 are scored as they should
be.
"""

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from hkd_d2.evaluation.protocols import (
    CITYPERSONS,
    MISSING_POINTS,
    ROUNDED_FPPI,
    SETUPS,
    CrowdHumanProtocol,
    Protocol,
    Setup,
    describe_ranges,
    select_protocol,
    select_setups,
)

try:
    from hkd_d2._native import read_annotations, read_detections, trace_setups

    NATIVE = True
except ImportError as _error:
    NATIVE = False
    if not isinstance(_error, ModuleNotFoundError):  # from an older state of csrc/
        warnings.warn(
            "hkd_d2._native does not fit this version of hkd_d2, so the slower evaluation in "
            "NumPy runs; build it again with 'pip install --no-build-isolation -e .' "
            f"({_error}).",
            stacklevel=2,
        )

__all__ = [
    "MISSING_POINTS",
    "REFERENCE_FPPI",
    "SETUPS",
    "MissRateResult",
    "Setup",
    "SetupMatches",
    "check_ground_truth",
    "evaluate_miss_rate",
    "format_table",
    "load_detections",
    "load_ground_truth",
    "match_setup",
    "overlaps",
    "select_setups",
]

logger = logging.getLogger(__name__)

PEDESTRIAN = 1  # the one category that counts, fixed by the benchmark
MIN_OVERLAP = 0.5
HEIGHT_SLACK = CITYPERSONS.height_slack
NATIVE_SETUPS = 64  # of one pass of the compiled matcher

# The nine values of FPPI, rounded as in the published script.
REFERENCE_FPPI = np.array(ROUNDED_FPPI)
REFERENCE_FPPI.flags.writeable = False


@dataclass(frozen=True, eq=False)
class MissRateResult:
    """The outcome of one setup.

    Attributes:
        setup: the setup that was evaluated.
        miss_rate: MR^-2 in percent; -100.0 where nothing is countable (no such box, or no category
            1 among the ground truth's categories), which is what the published script prints.
        num_ground_truth: countable ground-truth boxes.
        num_detections: counted detections, true and false positives; the length of the curve.
        scores: float64 (num_detections,), falling; the threshold of each operating point.
        fppi: float64 (num_detections,), false positives per image.
        miss: float64 (num_detections,), one minus recall; NaN where nothing is countable.
        reference_miss: float64 (9,), the misses read at the protocol's reference values of FPPI;
            NaN likewise.
    """

    setup: Setup
    miss_rate: float
    num_ground_truth: int
    num_detections: int
    scores: np.ndarray
    fppi: np.ndarray
    miss: np.ndarray
    reference_miss: np.ndarray


@dataclass(frozen=True, eq=False)
class SetupMatches:
    """Which detection took which pedestrian under one setup.

    A detection matches before those of lower score are looked at. So the first k detections match
    as they would alone, and every operating point can be read from one matching.

    Attributes:
        num_images: images of the ground truth.
        detection: int64 (D,), rows of the detections that count, in the order of the curve of
            :class:`MissRateResult`: by falling score.
        annotation: int64 (D,), the row of the annotation that each took; -1 for a false positive.
        pedestrian: int64 (G,), rows of the annotations that are countable, rising.
        detection_box: float64 (all detections, 4), [x, y, w, h], as the protocol cuts and resizes
            them; NaN where the detection plays no part, as one of another category.
        annotation_box: float64 (all annotations, 4), likewise.
        height, visibility: float64 (all annotations,), as the protocol reads them; NaN likewise.
    """

    num_images: int
    detection: np.ndarray
    annotation: np.ndarray
    pedestrian: np.ndarray
    detection_box: np.ndarray
    annotation_box: np.ndarray
    height: np.ndarray
    visibility: np.ndarray

    @property
    def fppi(self) -> np.ndarray:
        """float64 (D,), false positives per image, as in :class:`MissRateResult`."""
        return np.cumsum(self.annotation < 0) / self.num_images


def evaluate_miss_rate(
    ground_truth: Mapping[str, Any],
    detections: list[dict[str, Any]],
    setups: Mapping[str, Setup] | Iterable[str] | None = None,
    missing_point: str | None = None,
    impl: str | None = None,
    protocol: Protocol | str = CITYPERSONS,
) -> dict[str, MissRateResult]:
    """Compute the log-average miss rate of every setup. The arguments are not changed.

    Args:
        ground_truth: COCO-style, as :func:`load_ground_truth` returns it.
        detections: COCO results, as :func:`load_detections` returns them. Those of a category other
            than 1 are dropped, as the published script does, and a warning says how many.
        setups: names out of the protocol's setups, or setups of your own by name; None for all of
            the protocol's.
        missing_point: a key of :data:`MISSING_POINTS`, the recall at a reference value that lies
            below the first operating point; None for the protocol's. Below 100 images one early
            false positive is enough to make a difference; from 100 images on none is.
        impl: "native" for the compiled matcher, "reference" for the definition, whose results are
            the same bits; None for the first where it is compiled.
        protocol: the rules, or a name out of :data:`hkd_d2.evaluation.protocols.PROTOCOLS`.

    Returns:
        A result for each setup, in the order of ``setups``.

    Raises:
        ValueError: on malformed ground truth or detections, naming the row, an unknown setup, an
            unknown ``missing_point``, ``impl`` or ``protocol``.
        RuntimeError: if ``impl`` is "native" where that is not compiled.
    """
    protocol = _miss_rate_protocol(protocol)
    missing_point = protocol.missing_point if missing_point is None else missing_point
    if missing_point not in MISSING_POINTS:
        raise ValueError(
            f"missing_point is {missing_point!r}; choose one of {', '.join(MISSING_POINTS)}."
        )
    protocol = replace(protocol, missing_point=missing_point)
    setups = select_setups(setups, protocol)
    native = _use_native(impl)
    truth, found = _read(ground_truth, detections, protocol, native)
    if len(found.score) < len(detections):
        logger.warning(
            "%d of %d detections have a category_id other than %d and do not count.",
            len(detections) - len(found.score),
            len(detections),
            PEDESTRIAN,
        )
    num_images = len(truth.image_index)
    if 1 / num_images > protocol.reference_fppi[0]:
        logger.warning(
            "The set has %d images, so that one false positive is %.3g per image: where a curve "
            "starts above %.2g, the miss rate hangs on the rule %r, %s.",
            num_images,
            1 / num_images,
            protocol.reference_fppi[0],
            missing_point,
            MISSING_POINTS[missing_point],
        )
    trace = _trace_native if native else _trace_reference
    curves = trace(list(setups.values()), truth, found, protocol)
    if not truth.has_category:
        curves = [
            replace(curve, num_ground_truth=0, miss=np.full_like(curve.miss, np.nan))
            for curve in curves
        ]
    return {
        name: _summarise(setup, curve, protocol)
        for (name, setup), curve in zip(setups.items(), curves, strict=True)
    }


def match_setup(
    ground_truth: Mapping[str, Any],
    detections: list[dict[str, Any]],
    setup: Setup,
    protocol: Protocol | str = CITYPERSONS,
) -> SetupMatches:
    """Match as :func:`evaluate_miss_rate` does, and say which box became what.

    This is the matching of the definition in NumPy, steps 1 to 6; the curve of the compiled one
    has the same bits. Rows are positions in the lists that are given.

    Args:
        ground_truth: COCO-style, as :func:`load_ground_truth` returns it.
        detections: COCO results, as :func:`load_detections` returns them.
        setup: which pedestrians count.
        protocol: the rules, or a name out of :data:`hkd_d2.evaluation.protocols.PROTOCOLS`.

    Raises:
        ValueError: on malformed ground truth or detections, naming the row.
    """
    protocol = _miss_rate_protocol(protocol)
    truth, found = _read(ground_truth, detections, protocol, NATIVE)
    annotations = ground_truth["annotations"]
    truth_row = _rows_that_count(annotations, protocol.labels)
    image = [truth.image_index[annotations[row]["image_id"]] for row in truth_row]
    truth_row = truth_row[np.argsort(image, kind="stable")]  # as _read_ground_truth does
    found_row = _rows_that_count(detections)
    order = _rank(found, protocol)

    candidates = _match_candidates(truth, found.take(order), protocol)
    matching = _match(setup, truth, candidates, protocol)
    taken = matching.truth >= 0
    annotation = np.full(len(taken), -1, dtype=np.int64)
    annotation[taken] = truth_row[matching.truth[taken]]
    countable = matching.countable if truth.has_category else np.zeros_like(matching.countable)
    counted_box = np.where(countable[:, None], truth.counted_box, truth.box)
    return SetupMatches(
        num_images=len(truth.image_index),
        detection=found_row[order][matching.detection],
        annotation=annotation,
        pedestrian=np.sort(truth_row[countable]),
        detection_box=_spread(found.box, found_row, len(detections)),
        annotation_box=_spread(counted_box, truth_row, len(annotations)),
        height=_spread(truth.height, truth_row, len(annotations)),
        visibility=_spread(truth.visibility, truth_row, len(annotations)),
    )


def _miss_rate_protocol(protocol: Protocol | str) -> Protocol:
    protocol = select_protocol(protocol)
    if not isinstance(protocol, Protocol):
        raise ValueError(
            f"protocol {protocol.name!r} has scores of its own; call evaluate_crowdhuman."
        )
    return protocol


def _rows_that_count(
    rows: list[dict[str, Any]], labels: tuple[str, ...] | None = None
) -> np.ndarray:
    return np.array(
        [
            number
            for number, row in enumerate(rows)
            if row["category_id"] == PEDESTRIAN
            and (labels is None or row.get("label", labels[0]) in labels)
        ],
        dtype=np.int64,
    )


def _spread(values: np.ndarray, rows: np.ndarray, length: int) -> np.ndarray:
    """Values at their rows of ``length``, NaN elsewhere."""
    spread = np.full((length, *values.shape[1:]), np.nan)
    spread[rows] = values
    return spread


def _use_native(impl: str | None) -> bool:
    if impl not in (None, "native", "reference"):
        raise ValueError(f"impl is {impl!r}; choose one of None, native, reference.")
    if impl == "native" and not NATIVE:
        raise RuntimeError(
            "impl is 'native', but hkd_d2._native is not compiled in this installation; pass "
            "impl=None to use what there is."
        )
    return NATIVE and impl != "reference"


def format_table(results: Mapping[str, MissRateResult]) -> str:
    """Lay results out as a plain-text table: setup, its ranges, countable boxes, percent."""
    ranges = describe_ranges({name: result.setup for name, result in results.items()})
    rows = [("setup", *ranges, "boxes", "MR^-2 %")]
    for name, *cells, result in zip(results, *ranges.values(), results.values(), strict=True):
        rows.append((name, *cells, str(result.num_ground_truth), f"{result.miss_rate:.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if column <= len(ranges) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ reading


def load_ground_truth(
    path: str | os.PathLike, protocol: Protocol | CrowdHumanProtocol | str = CITYPERSONS
) -> dict[str, Any]:
    """Read a COCO-style ground-truth file such as CityPersons' ``val_gt.json``.

    Args:
        path: a JSON object with ``images`` (each with an integer ``id``), ``categories`` and
            ``annotations``: ``image_id``, ``category_id``, ``bbox`` [x, y, w, h] in pixels,
            ``height`` in pixels, ``vis_ratio`` (visible share) and, where it is not 0, ``ignore``.
        protocol: whose rules it will be evaluated by, which decides what else an annotation needs,
            or need not have: ``occlusion`` (KAIST: 0, 1 or 2; EuroCity: percent), ``truncation``
            (percent, 0 where missing), ``label``; and whether images need ``width`` and ``height``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is malformed; the message names the file and the row.
    """
    ground_truth = _load_json(path)
    check_ground_truth(ground_truth, str(path), protocol)
    return ground_truth


def check_ground_truth(
    ground_truth: Mapping[str, Any],
    source: str,
    protocol: Protocol | CrowdHumanProtocol | str = CITYPERSONS,
) -> None:
    """Raise ValueError, naming ``source`` and the row, where ground truth is malformed."""
    _read_ground_truth(ground_truth, source, select_protocol(protocol), NATIVE)


def load_detections(
    path: str | os.PathLike,
    ground_truth: Mapping[str, Any],
    protocol: Protocol | CrowdHumanProtocol | str = CITYPERSONS,
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
    detections = _load_json(path)
    check_detections(detections, ground_truth, str(path), protocol)
    return detections


def check_detections(
    detections: list[dict[str, Any]],
    ground_truth: Mapping[str, Any],
    source: str,
    protocol: Protocol | CrowdHumanProtocol | str = CITYPERSONS,
) -> None:
    """Raise ValueError, naming ``source`` and the row, where detections are malformed."""
    truth = _read_ground_truth(ground_truth, "ground truth", select_protocol(protocol), NATIVE)
    _read_detections(detections, truth, source, NATIVE)


def _load_json(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist or is no file; give that of a JSON file.")
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
            raise ValueError(f"{path} is not valid JSON ({error}); export it again.") from None


@dataclass(frozen=True, eq=False)
class _Boxes:
    image: np.ndarray  # int64 (N,), index into the images in the order of their ids
    box: np.ndarray  # float64 (N, 4), [x, y, w, h]


@dataclass(frozen=True, eq=False)
class _GroundTruth(_Boxes):
    """Of the category that counts, by image, then in the order of the file."""

    image_index: dict[int, int]  # image id -> index
    image_size: np.ndarray | None  # float64 (I, 2), width and height, where boxes are cut
    counted_box: np.ndarray  # float64 (N, 4), in the place of ``box`` where it is countable
    height: np.ndarray  # float64 (N,)
    visibility: np.ndarray  # float64 (N,)
    occlusion: np.ndarray | None  # float64 (N,), where the protocol has it
    truncation: np.ndarray | None  # float64 (N,), likewise
    ignore: np.ndarray  # bool (N,), the file's own flag, and what no setup counts
    region: np.ndarray  # bool (N,), ignored, it absorbs by the detection's own area
    has_category: bool  # the category that counts is among the categories

    def take(self, rows: np.ndarray) -> "_GroundTruth":
        columns = {
            name: column[rows]
            for name, column in vars(self).items()
            if isinstance(column, np.ndarray) and name != "image_size"
        }
        return replace(self, **columns)


@dataclass(frozen=True, eq=False)
class _Detections(_Boxes):
    """Of the category that counts, in the order of the file."""

    score: np.ndarray  # float64 (N,)

    def take(self, order: np.ndarray) -> "_Detections":
        return _Detections(self.image[order], self.box[order], self.score[order])


def _read(
    ground_truth, detections, protocol: Protocol, native: bool
) -> tuple[_GroundTruth, _Detections]:
    """Both as the protocol matches them."""
    truth = _read_ground_truth(ground_truth, "ground truth", protocol, native)
    found = _read_detections(detections, truth, "detections", native)
    if protocol.clip_to_image:
        found = replace(found, box=_cut(found.box, truth.image_size[found.image]))
    if protocol.resize_detections:
        found = replace(found, box=_resize(found.box, protocol.aspect_ratio))
    if protocol.skip_undetected:
        truth = replace(truth, ignore=truth.ignore | ~np.isin(truth.image, found.image))
    return truth, found


def _read_ground_truth(
    ground_truth, source: str, protocol: Protocol | CrowdHumanProtocol, native: bool
) -> _GroundTruth:
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
            raise ValueError(f"{where} has id {image['id']!r}; make it an integer.")
        ids.append(int(image["id"]))
    if not ids:
        raise ValueError(f"{source} lists no images; list all of them, the empty ones too.")
    image_index = {image_id: index for index, image_id in enumerate(sorted(ids))}
    if len(image_index) < len(ids):
        raise ValueError(f"{source} uses an image id twice; number the images apart.")
    for row, category in enumerate(ground_truth["categories"]):
        _check_keys(category, ("id",), f"{source}: categories[{row}]")

    annotations = ground_truth["annotations"]
    # The compiled reader gives None where a row is not what json.load makes of a good one.
    columns = read_annotations(annotations, image_index, PEDESTRIAN) if native else None
    if columns is None:
        columns = _read_annotations(annotations, image_index, source, protocol.annotation_keys)
    image, box, height, visibility, ignore = columns
    truth = _GroundTruth(
        image=image,
        box=box,
        image_index=image_index,
        image_size=None,
        counted_box=box,
        height=height,
        visibility=visibility,
        occlusion=None,
        truncation=None,
        ignore=ignore,
        region=np.ones(len(image), dtype=bool),
        has_category=any(category["id"] == PEDESTRIAN for category in ground_truth["categories"]),
    )
    if protocol.clip_to_image:
        truth = replace(truth, image_size=_image_sizes(ground_truth["images"], source))
    if isinstance(protocol, Protocol):
        truth = _apply_protocol(truth, annotations, source, protocol)
    return truth.take(np.argsort(truth.image, kind="stable"))


def _apply_protocol(
    truth: _GroundTruth, annotations: list, source: str, protocol: Protocol
) -> _GroundTruth:
    """The rules that are the same for all setups; rows in the order of the file."""
    changed = {}
    if "occlusion" in protocol.annotation_keys:
        for key in ("occlusion", "truncation"):
            changed[key] = _read_column(
                annotations, key, source, required=key in protocol.annotation_keys
            )
    if protocol.ignored_overlap == "crowd":
        changed["region"] = _read_column(annotations, "iscrowd", source).astype(bool)
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
    stays = _rows_that_count(annotations, protocol.labels)
    return truth.take(np.isin(_rows_that_count(annotations), stays))


def _read_column(annotations: list, key: str, source: str, required: bool = False) -> np.ndarray:
    """A number of 0 or more of each annotation that counts, 0 where it is missing; float64."""
    values = []
    for row in _rows_that_count(annotations).tolist():
        where = f"{source}: annotations[{row}]"
        if required:
            _check_keys(annotations[row], (key,), where)
        value = annotations[row].get(key, 0)
        if not isinstance(value, Real) or not 0 <= value <= sys.float_info.max:
            raise ValueError(f"{where} has {key} {value!r}; make it a number of 0 or more.")
        values.append(value)
    return np.array(values, dtype=np.float64)


def _image_sizes(images: list, source: str) -> np.ndarray:
    """Width and height of the images in the order of their ids, float64 (I, 2)."""
    sizes = {}
    for row, image in enumerate(images):
        where = f"{source}: images[{row}]"
        _check_keys(image, ("width", "height"), where)
        sizes[image["id"]] = size = (image["width"], image["height"])
        if not all(_is_finite(side) and side > 0 for side in size):
            raise ValueError(f"{where} has width and height {size}; make them pixels.")
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
    annotations, image_index: dict[int, int], source: str, required: tuple[str, ...]
):
    """Columns of the annotations that count: image, box, height, visibility, ignore."""
    annotation_ids = set()
    image, box, height, visibility, ignore = [], [], [], [], []
    for row, annotation in enumerate(annotations):
        where = f"{source}: annotations[{row}]"
        _check_keys(annotation, ("image_id", "category_id"), where)
        _check_image(annotation["image_id"], image_index, where, "add the image or drop the row")
        annotation_id = annotation.get("id", -1 - row)  # the ids matter to no number
        if not isinstance(annotation_id, Integral) or annotation_id in annotation_ids:
            raise ValueError(
                f"{where} has id {annotation_id!r}, used twice or not an integer; renumber them."
            )
        annotation_ids.add(annotation_id)
        _check_category(annotation["category_id"], where)
        if annotation["category_id"] != PEDESTRIAN:
            continue
        _check_keys(annotation, ("bbox",), where)
        _check_box(annotation["bbox"], where)
        quantities = {"height": annotation["bbox"][3], "vis_ratio": 1.0}
        for key in quantities:
            if key in required:
                _check_keys(annotation, (key,), where)
            value = quantities[key] = annotation.get(key, quantities[key])
            if not _is_finite(value) or value < 0:
                raise ValueError(f"{where} has {key} {value!r}; make it a number of 0 or more.")
        flag = annotation.get("ignore", 0)
        if not isinstance(flag, Real) or flag not in (0, 1):
            raise ValueError(f"{where} has ignore {flag!r}; make it 0 or 1.")
        image.append(image_index[annotation["image_id"]])
        box.append(annotation["bbox"])
        height.append(quantities["height"])
        visibility.append(quantities["vis_ratio"])
        ignore.append(flag)

    return (
        np.array(image, dtype=np.int64),
        np.array(box, dtype=np.float64).reshape(-1, 4),
        np.array(height, dtype=np.float64),
        np.array(visibility, dtype=np.float64),
        np.array(ignore, dtype=bool),
    )


def _read_detections(detections, truth: _GroundTruth, source: str, native: bool) -> _Detections:
    if not isinstance(detections, list):
        raise ValueError(
            f"{source} holds a {type(detections).__name__}, not a list of detections; write COCO's "
            "result format, and check that ground truth and detections are not swapped."
        )
    columns = read_detections(detections, truth.image_index, PEDESTRIAN) if native else None
    if columns is not None:
        return _Detections(*columns)
    image, box, score = [], [], []
    for row, detection in enumerate(detections):
        where = f"{source}: detection {row}"
        _check_keys(detection, ("image_id", "category_id", "bbox", "score"), where)
        _check_image(
            detection["image_id"], truth.image_index, where, "detect on the evaluated images only"
        )
        _check_category(detection["category_id"], where)
        _check_box(detection["bbox"], where)
        if not _is_finite(detection["score"]):
            raise ValueError(f"{where} has score {detection['score']!r}; make it a finite number.")
        if detection["category_id"] == PEDESTRIAN:
            image.append(truth.image_index[detection["image_id"]])
            box.append(detection["bbox"])
            score.append(detection["score"])
    return _Detections(
        image=np.array(image, dtype=np.int64),
        box=np.array(box, dtype=np.float64).reshape(-1, 4),
        score=np.array(score, dtype=np.float64),
    )


def _check_keys(row, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {row!r}; make it an object with {', '.join(keys)}.")
    for key in keys:
        if key not in row:
            raise ValueError(f"{where} has no {key!r}; add it.")


def _check_image(image_id, image_index: dict[int, int], where: str, advice: str) -> None:
    if not isinstance(image_id, Real) or image_id not in image_index:
        raise ValueError(f"{where} lies in image {image_id!r}, which the set lacks; {advice}.")


def _check_category(category_id, where: str) -> None:
    if not isinstance(category_id, Real):
        raise ValueError(f"{where} has category_id {category_id!r}; make it an integer.")


def _check_box(box, where: str) -> None:
    if not isinstance(box, list | tuple | np.ndarray) or len(box) != 4:
        raise ValueError(f"{where} has bbox {box!r}; make it four numbers [x, y, w, h].")
    if not all(map(_is_finite, box)):
        raise ValueError(f"{where} has bbox {box!r}; make its four numbers finite.")
    if box[2] < 0 or box[3] < 0:
        raise ValueError(
            f"{where} has a negative width or height in bbox {box!r}; give [x, y, w, h]."
        )


def _is_finite(value) -> bool:
    # As a comparison: math.isfinite raises at integers over the range of floats.
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


# ----------------------------------------------------------------------------------- matching


@dataclass(frozen=True, eq=False)
class _Curve:
    """The operating points of one setup; see :class:`MissRateResult`."""

    num_ground_truth: int
    scores: np.ndarray
    fppi: np.ndarray
    miss: np.ndarray


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Pairs of a detection and a ground-truth box that overlap enough to match in some setup.

    Pairs are in the order in which matching tries them: by detection (image, then falling score),
    then falling intersection over union, of equals the later ground truth first.
    """

    detections: _Detections
    detection: np.ndarray  # int64 (P,), index into detections
    truth: np.ndarray  # int64 (P,), index into the ground truth
    matches: np.ndarray  # bool (P,), the overlap is enough where the ground truth is countable
    absorbs: np.ndarray  # bool (P,), the overlap is enough where it is ignored


@dataclass(frozen=True, eq=False)
class _Matching:
    """The counted detections of one setup by falling score, and what each took."""

    detection: np.ndarray  # int64 (D,), index into the candidates' detections
    truth: np.ndarray  # int64 (D,), index into the ground truth; -1 for a false positive
    countable: np.ndarray  # bool (G,), ground truth that counts in this setup


def _trace_native(
    setups: list[Setup], truth: _GroundTruth, detections: _Detections, protocol: Protocol
) -> list[_Curve]:
    most = np.iinfo(np.int64).max
    curves = []
    for first in range(0, len(setups), NATIVE_SETUPS):
        part = setups[first : first + NATIVE_SETUPS]
        countable = np.zeros(len(truth.image), dtype=np.uint64)
        for bit, setup in enumerate(part):
            countable |= _countable(setup, truth, protocol).astype(np.uint64) << np.uint64(bit)
        curves += trace_setups(
            truth.image,
            truth.box,
            truth.counted_box,
            truth.region,
            countable,
            detections.image,
            detections.box,
            detections.score,
            heights=np.array([_first_and_end(setup, protocol) for setup in part]),
            images=len(truth.image_index),
            max_detections=most if protocol.max_detections is None else protocol.max_detections,
            min_overlap=MIN_OVERLAP,
        )
    return [_Curve(*curve) for curve in curves]


def _trace_reference(
    setups: list[Setup], truth: _GroundTruth, detections: _Detections, protocol: Protocol
) -> list[_Curve]:
    ranked = detections.take(_rank(detections, protocol))
    candidates = _match_candidates(truth, ranked, protocol)
    return [_trace_setup(setup, truth, candidates, protocol) for setup in setups]


def _rank(detections: _Detections, protocol: Protocol) -> np.ndarray:
    """Indices by image, then falling score, each image cut to the first that count."""
    order = np.lexsort((-detections.score, detections.image))  # ties stay in the order of the file
    if protocol.max_detections is None:
        return order
    image = detections.image[order]
    rank = np.arange(len(image)) - np.searchsorted(image, image)  # within the image
    return order[rank < protocol.max_detections]


def _match_candidates(
    truth: _GroundTruth, detections: _Detections, protocol: Protocol
) -> _Candidates:
    images = np.arange(len(truth.image_index) + 1)
    truth_start = np.searchsorted(truth.image, images)
    detection_start = np.searchsorted(detections.image, images)
    # an empty block first, so that sets without any pair concatenate too
    index = [np.zeros((2, 0), dtype=np.int64)]
    overlap = [np.zeros((2, 0))]
    for image in images[:-1]:
        people = slice(truth_start[image], truth_start[image + 1])
        boxes = detections.box[detection_start[image] : detection_start[image + 1]]
        over_union, over_detection = overlaps(boxes, truth.counted_box[people])
        ignored = over_detection
        if protocol.aspect_ratio or protocol.ignored_overlap == "crowd":
            plain_over_union, over_detection = overlaps(boxes, truth.box[people])
            ignored = np.where(truth.region[people], over_detection, plain_over_union)
        enough = (over_union >= MIN_OVERLAP) | (ignored >= MIN_OVERLAP)
        row, column = np.nonzero(enough)
        index.append(np.stack([row + detection_start[image], column + truth_start[image]]))
        overlap.append(np.stack([over_union[enough], ignored[enough]]))
    detection, matched = np.concatenate(index, axis=1)
    over_union, ignored = np.concatenate(overlap, axis=1)
    order = np.lexsort((-matched, -over_union, detection))
    return _Candidates(
        detections=detections,
        detection=detection[order],
        truth=matched[order],
        matches=over_union[order] >= MIN_OVERLAP,
        absorbs=ignored[order] >= MIN_OVERLAP,
    )


def overlaps(detections: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersection over union and over the detection's area, (D, 4) and (G, 4) to two (D, G).

    Boxes are [x, y, w, h], float64, without a "+ 1".
    """
    detections = detections[:, None]
    low = np.maximum(detections[..., :2], truth[:, :2])
    high = np.minimum(
        detections[..., :2] + detections[..., 2:],
        truth[:, :2] + truth[:, 2:],
    )
    sides = (high - low).clip(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    area = detections[..., 2] * detections[..., 3]
    union = area + truth[:, 2] * truth[:, 3] - intersection
    positive = intersection > 0
    zeros = np.zeros_like(intersection)
    return (
        np.divide(intersection, union, out=zeros.copy(), where=positive),
        np.divide(intersection, area, out=zeros, where=positive),
    )


def _match(
    setup: Setup, truth: _GroundTruth, candidates: _Candidates, protocol: Protocol
) -> _Matching:
    detections = candidates.detections
    countable = _countable(setup, truth, protocol)
    height = detections.box[:, 3]
    kept = np.ones(len(height), dtype=bool)
    if protocol.height_slack is not None:
        low = setup.height[0] / protocol.height_slack
        kept = height > low if protocol.lowest_is_dropped else height >= low
        kept &= height < setup.height[1] * protocol.height_slack

    may_count = countable[candidates.truth]
    may_match = candidates.matches & may_count & kept[candidates.detection]
    matched = np.full(len(height), -1, dtype=np.int64)
    taken = np.zeros(len(countable), dtype=bool)
    for detection, box in zip(
        candidates.detection[may_match].tolist(), candidates.truth[may_match].tolist(), strict=True
    ):
        if matched[detection] < 0 and not taken[box]:
            matched[detection] = box
            taken[box] = True
    absorbed = np.zeros(len(height), dtype=bool)
    absorbed[candidates.detection[candidates.absorbs & ~may_count]] = True

    counted = np.flatnonzero(kept & ((matched >= 0) | ~absorbed))
    counted = counted[np.argsort(-detections.score[counted], kind="stable")]
    return _Matching(detection=counted, truth=matched[counted], countable=countable)


def _countable(setup: Setup, truth: _GroundTruth, protocol: Protocol) -> np.ndarray:
    """Ground truth that counts in the setup, bool (G,)."""
    counts = ~truth.ignore
    for quantity, (low, high) in setup.ranges().items():
        values = getattr(truth, quantity)
        if values is None:
            raise ValueError(
                f"A setup has a range of {quantity}, which protocol {protocol.name!r} does not "
                "read; choose another protocol or leave the range out."
            )
        counts &= values >= low
        counts &= values < high if quantity in protocol.half_open else values <= high
    return counts


def _first_and_end(setup: Setup, protocol: Protocol) -> tuple[float, float]:
    """Heights of detections for the compiled matcher: from the first on, below the second."""
    if protocol.height_slack is None:
        return 0.0, math.inf
    low, high = setup.height
    first = low / protocol.height_slack
    if protocol.lowest_is_dropped:
        first = float(np.nextafter(first, math.inf))
    return first, high * protocol.height_slack


def _trace_setup(
    setup: Setup, truth: _GroundTruth, candidates: _Candidates, protocol: Protocol
) -> _Curve:
    matching = _match(setup, truth, candidates, protocol)
    true_positive = matching.truth >= 0
    num_ground_truth = int(np.count_nonzero(matching.countable))
    if num_ground_truth:
        miss = 1 - np.cumsum(true_positive) / num_ground_truth
    else:
        miss = np.full(len(true_positive), np.nan)
    return _Curve(
        num_ground_truth=num_ground_truth,
        scores=candidates.detections.score[matching.detection],
        fppi=np.cumsum(~true_positive) / len(truth.image_index),
        miss=miss,
    )


def _summarise(setup: Setup, curve: _Curve, protocol: Protocol) -> MissRateResult:
    if curve.num_ground_truth:
        reference_miss = _miss_at_references(curve, protocol)
        with np.errstate(divide="ignore"):  # perfect recall: log 0, and a miss rate of 0
            logs = np.log(np.maximum(reference_miss, protocol.miss_floor))
            miss_rate = float(np.exp(np.mean(logs)) * 100)
    else:
        reference_miss = np.full(len(protocol.reference_fppi), np.nan)
        miss_rate = -100.0
    return MissRateResult(
        setup=setup,
        miss_rate=miss_rate,
        num_ground_truth=curve.num_ground_truth,
        num_detections=len(curve.fppi),
        scores=curve.scores,
        fppi=curve.fppi,
        miss=curve.miss,
        reference_miss=reference_miss,
    )


def _miss_at_references(curve: _Curve, protocol: Protocol) -> np.ndarray:
    reference_fppi = np.array(protocol.reference_fppi)
    if not len(curve.fppi):  # no counted detection
        return np.ones(len(reference_fppi))
    last = np.searchsorted(curve.fppi, reference_fppi, side="right") - 1
    at_reference = curve.miss[last]  # official: -1 wraps around to the last operating point
    wraps = protocol.missing_point == "official"
    return at_reference if wraps else np.where(last < 0, 1.0, at_reference)
