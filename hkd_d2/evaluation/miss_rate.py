"""Log-average miss rate (MR^-2) of pedestrian detections, as the CityPersons benchmark computes it.

Needs NumPy alone. The numbers equal those of the benchmark's evaluation script (Zhang, Benenson and
Schiele, "CityPersons", CVPR 2017; github.com/cvgroup-njust/CityPersons, ``eval_script``), which
follows the Caltech protocol (Dollar et al., "Pedestrian Detection: An Evaluation of the State of
the Art", PAMI 2012). One setup is evaluated like this:

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
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

import numpy as np

try:
    from hkd_d2._native import miss_rate_curves, read_annotations, read_detections

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
MAX_DETECTIONS = 1000  # per image
MIN_OVERLAP = 0.5
HEIGHT_SLACK = 1.25  # detections may miss the setup's heights by this factor
NATIVE_SETUPS = 64  # of one pass of the compiled matcher

# 10^(-2 : 0.25 : 0), as the four-decimal literals of the published script.
REFERENCE_FPPI = np.array([0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0])
REFERENCE_FPPI.flags.writeable = False

# The recall at a reference value below the FPPI of the first operating point.
MISSING_POINTS = MappingProxyType(
    {
        "official": "the recall of the last operating point, which is the best one (index -1 wraps "
        "around in the published Python script)",
        "matlab": "recall 0, as in the MATLAB toolbox of the Caltech benchmark",
    }
)


@dataclass(frozen=True)
class Setup:
    """Which pedestrians count; both ranges include their bounds.

    Attributes:
        height: lowest and highest height in pixels.
        visibility: lowest and highest visible share of the full box's area.
    """

    height: tuple[float, float]
    visibility: tuple[float, float]

    def counts(self, annotation: Mapping[str, Any]) -> bool:
        """Whether an annotation of the category is countable."""
        return (
            not annotation.get("ignore", 0)
            and self.height[0] <= annotation["height"] <= self.height[1]
            and self.visibility[0] <= annotation["vis_ratio"] <= self.visibility[1]
        )


_NO_LIMIT = 1e10

# Two setups mean "heavily occluded", and they differ by about nine points on the same detections:
# "Reasonable_occ=heavy" (0.2 to 0.65) is the benchmark's own, "heavy" (0 to 0.65) belongs to the
# bare / partial / heavy split of the CSP line of papers.
SETUPS = MappingProxyType(
    {
        # the benchmark's own
        "Reasonable": Setup((50, _NO_LIMIT), (0.65, _NO_LIMIT)),
        "Reasonable_small": Setup((50, 75), (0.65, _NO_LIMIT)),
        "Reasonable_occ=heavy": Setup((50, _NO_LIMIT), (0.2, 0.65)),
        "All": Setup((20, _NO_LIMIT), (0.2, _NO_LIMIT)),
        # by occlusion
        "bare": Setup((50, _NO_LIMIT), (0.9, _NO_LIMIT)),
        "partial": Setup((50, _NO_LIMIT), (0.65, 0.9)),
        "heavy": Setup((50, _NO_LIMIT), (0, 0.65)),
        # by size
        "small": Setup((50, 75), (0.65, _NO_LIMIT)),
        "middle": Setup((75, 100), (0.65, _NO_LIMIT)),
        "large": Setup((100, _NO_LIMIT), (0.65, _NO_LIMIT)),
    }
)


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
        reference_miss: float64 (9,), the misses read at ``REFERENCE_FPPI``; NaN likewise.
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
    """

    num_images: int
    detection: np.ndarray
    annotation: np.ndarray
    pedestrian: np.ndarray

    @property
    def fppi(self) -> np.ndarray:
        """float64 (D,), false positives per image, as in :class:`MissRateResult`."""
        return np.cumsum(self.annotation < 0) / self.num_images


def evaluate_miss_rate(
    ground_truth: Mapping[str, Any],
    detections: list[dict[str, Any]],
    setups: Mapping[str, Setup] | Iterable[str] = SETUPS,
    missing_point: str = "official",
    impl: str | None = None,
) -> dict[str, MissRateResult]:
    """Compute the log-average miss rate of every setup. The arguments are not changed.

    Args:
        ground_truth: COCO-style, as :func:`load_ground_truth` returns it.
        detections: COCO results, as :func:`load_detections` returns them. Those of a category other
            than 1 are dropped, as the published script does, and a warning says how many.
        setups: names out of :data:`SETUPS`, or setups of your own by name.
        missing_point: a key of :data:`MISSING_POINTS`, the recall at a reference value that lies
            below the first operating point. Below 100 images one early false positive is enough to
            make a difference; from 100 images on none is.
        impl: "native" for the compiled matcher, "reference" for the definition, whose results are
            the same bits; None for the first where it is compiled.

    Returns:
        A result for each setup, in the order of ``setups``.

    Raises:
        ValueError: on malformed ground truth or detections, naming the row, an unknown setup, an
            unknown ``missing_point`` or an unknown ``impl``.
        RuntimeError: if ``impl`` is "native" where that is not compiled.
    """
    if missing_point not in MISSING_POINTS:
        raise ValueError(
            f"missing_point is {missing_point!r}; choose one of {', '.join(MISSING_POINTS)}."
        )
    setups = select_setups(setups)
    native = _use_native(impl)
    truth = _read_ground_truth(ground_truth, "ground truth", native)
    found = _read_detections(detections, truth, "detections", native)
    if len(found.score) < len(detections):
        logger.warning(
            "%d of %d detections have a category_id other than %d and do not count.",
            len(detections) - len(found.score),
            len(detections),
            PEDESTRIAN,
        )
    num_images = len(truth.image_index)
    if 1 / num_images > REFERENCE_FPPI[0]:
        logger.warning(
            "The set has %d images, so that one false positive is %.3g per image: where a curve "
            "starts above %.2g, the miss rate hangs on the rule %r, %s.",
            num_images,
            1 / num_images,
            REFERENCE_FPPI[0],
            missing_point,
            MISSING_POINTS[missing_point],
        )
    trace = _trace_native if native else _trace_reference
    curves = trace(list(setups.values()), truth, found)
    if not truth.has_category:
        curves = [
            replace(curve, num_ground_truth=0, miss=np.full_like(curve.miss, np.nan))
            for curve in curves
        ]
    return {
        name: _summarise(setup, curve, missing_point)
        for (name, setup), curve in zip(setups.items(), curves, strict=True)
    }


def match_setup(
    ground_truth: Mapping[str, Any], detections: list[dict[str, Any]], setup: Setup
) -> SetupMatches:
    """Match as :func:`evaluate_miss_rate` does, and say which box became what.

    This is the matching of the definition in NumPy, steps 1 to 6; the curve of the compiled one
    has the same bits. Rows are positions in the lists that are given.

    Args:
        ground_truth: COCO-style, as :func:`load_ground_truth` returns it.
        detections: COCO results, as :func:`load_detections` returns them.
        setup: which pedestrians count.

    Raises:
        ValueError: on malformed ground truth or detections, naming the row.
    """
    truth = _read_ground_truth(ground_truth, "ground truth", NATIVE)
    found = _read_detections(detections, truth, "detections", NATIVE)
    annotations = ground_truth["annotations"]
    truth_row = _rows_that_count(annotations)
    image = [truth.image_index[annotations[row]["image_id"]] for row in truth_row]
    truth_row = truth_row[np.argsort(image, kind="stable")]  # as _read_ground_truth does
    order = _rank(found)
    detection_row = _rows_that_count(detections)[order]

    matching = _match(setup, truth, _match_candidates(truth, found.take(order)))
    taken = matching.truth >= 0
    annotation = np.full(len(taken), -1, dtype=np.int64)
    annotation[taken] = truth_row[matching.truth[taken]]
    countable = ~matching.ignore if truth.has_category else np.zeros_like(matching.ignore)
    return SetupMatches(
        num_images=len(truth.image_index),
        detection=detection_row[matching.detection],
        annotation=annotation,
        pedestrian=np.sort(truth_row[countable]),
    )


def _rows_that_count(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array(
        [number for number, row in enumerate(rows) if row["category_id"] == PEDESTRIAN],
        dtype=np.int64,
    )


def _use_native(impl: str | None) -> bool:
    if impl not in (None, "native", "reference"):
        raise ValueError(f"impl is {impl!r}; choose one of None, native, reference.")
    if impl == "native" and not NATIVE:
        raise RuntimeError(
            "impl is 'native', but hkd_d2._native is not compiled in this installation; pass "
            "impl=None to use what there is."
        )
    return NATIVE and impl != "reference"


def select_setups(setups: Mapping[str, Setup] | Iterable[str]) -> dict[str, Setup]:
    """Look setups up by name; a mapping is returned as it is.

    Raises:
        ValueError: if a name is not in :data:`SETUPS`.
    """
    if isinstance(setups, Mapping):
        return dict(setups)
    names = [setups] if isinstance(setups, str) else list(setups)
    for name in names:
        if name not in SETUPS:
            raise ValueError(f"setup {name!r} is unknown; choose from {', '.join(SETUPS)}.")
    return {name: SETUPS[name] for name in names}


def format_table(results: Mapping[str, MissRateResult]) -> str:
    """Lay results out as a plain-text table: setup, its ranges, countable boxes, percent."""
    rows = [("setup", "height", "visibility", "boxes", "MR^-2 %")]
    for name, result in results.items():
        rows.append(
            (
                name,
                _format_range(result.setup.height),
                _format_range(result.setup.visibility),
                str(result.num_ground_truth),
                f"{result.miss_rate:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(lines)


def _format_range(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f">= {low:g}" if high >= _NO_LIMIT else f"{low:g} to {high:g}"


# ------------------------------------------------------------------------------------ reading


def load_ground_truth(path: str | os.PathLike) -> dict[str, Any]:
    """Read a COCO-style ground-truth file such as CityPersons' ``val_gt.json``.

    Args:
        path: a JSON object with ``images`` (each with an integer ``id``), ``categories`` and
            ``annotations``: ``image_id``, ``category_id``, ``bbox`` [x, y, w, h] in pixels,
            ``height`` in pixels, ``vis_ratio`` (visible share) and, where it is not 0, ``ignore``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is malformed; the message names the file and the row.
    """
    ground_truth = _load_json(path)
    check_ground_truth(ground_truth, str(path))
    return ground_truth


def check_ground_truth(ground_truth: Mapping[str, Any], source: str) -> None:
    """Raise ValueError, naming ``source`` and the row, where ground truth is malformed."""
    _read_ground_truth(ground_truth, source, NATIVE)


def load_detections(
    path: str | os.PathLike, ground_truth: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Read detections in COCO's result format.

    Args:
        path: a JSON list of ``{"image_id", "category_id", "bbox": [x, y, w, h], "score"}``, in any
            order; it may be empty.
        ground_truth: what the detections will be evaluated against.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is malformed, or a detection lies in an image that the ground truth does
            not have; the message names the file and the row.
    """
    detections = _load_json(path)
    truth = _read_ground_truth(ground_truth, "ground truth", NATIVE)
    _read_detections(detections, truth, str(path), NATIVE)
    return detections


def _load_json(path):
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist; give the path of a JSON file.")
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise ValueError(f"{path} is not valid JSON ({error}); export it again.") from None


@dataclass(frozen=True, eq=False)
class _Boxes:
    image: np.ndarray  # int64 (N,), index into the images in the order of their ids
    box: np.ndarray  # float64 (N, 4), [x, y, w, h]


@dataclass(frozen=True, eq=False)
class _GroundTruth(_Boxes):
    """Of the category that counts, by image, then in the order of the file."""

    image_index: dict[int, int]  # image id -> index
    height: np.ndarray  # float64 (N,)
    visibility: np.ndarray  # float64 (N,)
    ignore: np.ndarray  # bool (N,), the file's own flag
    has_category: bool  # the category that counts is among the categories


@dataclass(frozen=True, eq=False)
class _Detections(_Boxes):
    """Of the category that counts, in the order of the file."""

    score: np.ndarray  # float64 (N,)

    def take(self, order: np.ndarray) -> "_Detections":
        return _Detections(self.image[order], self.box[order], self.score[order])


def _read_ground_truth(ground_truth, source: str, native: bool) -> _GroundTruth:
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
        columns = _read_annotations(annotations, image_index, source)
    order = np.argsort(columns[0], kind="stable")
    image, box, height, visibility, ignore = (column[order] for column in columns)
    return _GroundTruth(
        image=image,
        box=box,
        image_index=image_index,
        height=height,
        visibility=visibility,
        ignore=ignore,
        has_category=any(category["id"] == PEDESTRIAN for category in ground_truth["categories"]),
    )


def _read_annotations(annotations, image_index: dict[int, int], source: str):
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
        if annotation["category_id"] != PEDESTRIAN:
            continue
        _check_keys(annotation, ("bbox", "height", "vis_ratio"), where)
        _check_box(annotation["bbox"], where)
        for key in ("height", "vis_ratio"):
            if not _is_finite(annotation[key]) or annotation[key] < 0:
                raise ValueError(
                    f"{where} has {key} {annotation[key]!r}; make it a number of 0 or more."
                )
        flag = annotation.get("ignore", 0)
        if not isinstance(flag, Real) or flag not in (0, 1):
            raise ValueError(f"{where} has ignore {flag!r}; make it 0 or 1.")
        image.append(image_index[annotation["image_id"]])
        box.append(annotation["bbox"])
        height.append(annotation["height"])
        visibility.append(annotation["vis_ratio"])
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
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


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
    over_union: np.ndarray  # bool (P,), intersection over union is enough
    over_detection: np.ndarray  # bool (P,), intersection over the detection's area is enough


@dataclass(frozen=True, eq=False)
class _Matching:
    """The counted detections of one setup by falling score, and what each took."""

    detection: np.ndarray  # int64 (D,), index into the candidates' detections
    truth: np.ndarray  # int64 (D,), index into the ground truth; -1 for a false positive
    ignore: np.ndarray  # bool (G,), ground truth that does not count in this setup


def _trace_native(
    setups: list[Setup], truth: _GroundTruth, detections: _Detections
) -> list[_Curve]:
    ranges = [[*setup.height, *setup.visibility, *_detection_heights(setup)] for setup in setups]
    return [
        _Curve(*curve)
        for first in range(0, len(setups), NATIVE_SETUPS)
        for curve in miss_rate_curves(
            truth.image,
            truth.box,
            truth.height,
            truth.visibility,
            truth.ignore,
            detections.image,
            detections.box,
            detections.score,
            ranges=np.array(ranges[first : first + NATIVE_SETUPS], dtype=np.float64),
            images=len(truth.image_index),
            max_detections=MAX_DETECTIONS,
            min_overlap=MIN_OVERLAP,
        )
    ]


def _trace_reference(
    setups: list[Setup], truth: _GroundTruth, detections: _Detections
) -> list[_Curve]:
    candidates = _match_candidates(truth, detections.take(_rank(detections)))
    return [_trace_setup(setup, truth, candidates) for setup in setups]


def _rank(detections: _Detections) -> np.ndarray:
    """Indices by image, then falling score, each image cut to the first that count."""
    order = np.lexsort((-detections.score, detections.image))  # ties stay in the order of the file
    image = detections.image[order]
    rank = np.arange(len(image)) - np.searchsorted(image, image)  # within the image
    return order[rank < MAX_DETECTIONS]


def _match_candidates(truth: _GroundTruth, detections: _Detections) -> _Candidates:
    images = np.arange(len(truth.image_index) + 1)
    truth_start = np.searchsorted(truth.image, images)
    detection_start = np.searchsorted(detections.image, images)
    # an empty block first, so that sets without any pair concatenate too
    index = [np.zeros((2, 0), dtype=np.int64)]
    overlap = [np.zeros((2, 0))]
    for image in images[:-1]:
        first, first_truth = detection_start[image], truth_start[image]
        over_union, over_detection = overlaps(
            detections.box[first : detection_start[image + 1]],
            truth.box[first_truth : truth_start[image + 1]],
        )
        enough = (over_union >= MIN_OVERLAP) | (over_detection >= MIN_OVERLAP)
        row, column = np.nonzero(enough)
        index.append(np.stack([row + first, column + first_truth]))
        overlap.append(np.stack([over_union[enough], over_detection[enough]]))
    detection, matched = np.concatenate(index, axis=1)
    over_union, over_detection = np.concatenate(overlap, axis=1)
    order = np.lexsort((-matched, -over_union, detection))
    return _Candidates(
        detections=detections,
        detection=detection[order],
        truth=matched[order],
        over_union=over_union[order] >= MIN_OVERLAP,
        over_detection=over_detection[order] >= MIN_OVERLAP,
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


def _match(setup: Setup, truth: _GroundTruth, candidates: _Candidates) -> _Matching:
    detections = candidates.detections
    ignore = truth.ignore | _outside(truth.height, setup.height)
    ignore |= _outside(truth.visibility, setup.visibility)
    height = detections.box[:, 3]
    low, high = _detection_heights(setup)
    kept = (height >= low) & (height < high)

    ignored_truth = ignore[candidates.truth]
    may_match = candidates.over_union & ~ignored_truth & kept[candidates.detection]
    matched = np.full(len(height), -1, dtype=np.int64)
    taken = np.zeros(len(ignore), dtype=bool)
    for detection, box in zip(
        candidates.detection[may_match].tolist(), candidates.truth[may_match].tolist(), strict=True
    ):
        if matched[detection] < 0 and not taken[box]:
            matched[detection] = box
            taken[box] = True
    absorbed = np.zeros(len(height), dtype=bool)
    absorbed[candidates.detection[candidates.over_detection & ignored_truth]] = True

    counted = np.flatnonzero(kept & ((matched >= 0) | ~absorbed))
    counted = counted[np.argsort(-detections.score[counted], kind="stable")]
    return _Matching(detection=counted, truth=matched[counted], ignore=ignore)


def _trace_setup(setup: Setup, truth: _GroundTruth, candidates: _Candidates) -> _Curve:
    matching = _match(setup, truth, candidates)
    true_positive = matching.truth >= 0
    num_ground_truth = int(np.count_nonzero(~matching.ignore))
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


def _detection_heights(setup: Setup) -> tuple[float, float]:
    """From the first on, below the second."""
    low, high = setup.height
    return low / HEIGHT_SLACK, high * HEIGHT_SLACK


def _outside(values: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    return (values < bounds[0]) | (values > bounds[1])


def _summarise(setup: Setup, curve: _Curve, missing_point: str) -> MissRateResult:
    if curve.num_ground_truth:
        reference_miss = _miss_at_references(curve, missing_point)
        with np.errstate(divide="ignore"):  # perfect recall: log 0, and a miss rate of 0
            miss_rate = float(np.exp(np.mean(np.log(reference_miss))) * 100)
    else:
        reference_miss = np.full(len(REFERENCE_FPPI), np.nan)
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


def _miss_at_references(curve: _Curve, missing_point: str) -> np.ndarray:
    if not len(curve.fppi):  # no counted detection
        return np.ones(len(REFERENCE_FPPI))
    last = np.searchsorted(curve.fppi, REFERENCE_FPPI, side="right") - 1
    at_reference = curve.miss[last]  # official: -1 wraps around to the last operating point
    return at_reference if missing_point == "official" else np.where(last < 0, 1.0, at_reference)
