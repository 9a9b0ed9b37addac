"""Log-average miss rate (MR^-2) of pedestrian detections, as the CityPersons benchmark computes it.

Needs NumPy alone. The numbers equal those of the benchmark's evaluation script (Zhang, Benenson and
Schiele, "CityPersons", CVPR 2017; github.com/cvgroup-njust/CityPersons, ``eval_script``), which
follows the Caltech protocol (Dollar et al., "Pedestrian Detection: An Evaluation of the State of
the Art", PAMI 2012). Other benchmarks change some of the steps:
:class:`hkd_d2.evaluation.protocols.Protocol` names each change. One setup is evaluated like this:

1.  Ground truth of the pedestrians' category. A box whose height or visible share lies outside the
    setup's range is ignored, as are those that the file itself marks ``ignore``.
2.  Detections of that category, by image id, then in the order of the file.
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

Steps 1 and 2 are in :mod:`hkd_d2.evaluation.coco_rows`, 3 to 6 in
:mod:`hkd_d2.evaluation.matching` and 7 here, in NumPy and plain Python, which is the definition
("reference"). Where ``hkd_d2._native`` is built, its C++ (``csrc/evaluation``, "compiled") repeats
them to the last bit, all setups in one pass.

Two differences. The published script takes category 1 alone; here it is the pedestrians', whatever
its id (:func:`hkd_d2.data.annotation_rules.pedestrian_category`). And the published script counts a
match with the annotation of ``id`` 0 as a false positive, which a protocol's
``id_zero_is_unmatched`` repeats; CityPersons' own file numbers from 1, KAIST's from 0.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hkd_d2.evaluation.coco_rows import (
    PEDESTRIAN,
    Detections,
    GroundTruth,
    check_detections,
    check_ground_truth,
    load_detections,
    load_ground_truth,
    read_both,
    rows_of_category,
)
from hkd_d2.evaluation.compiled import COMPILED, use_compiled
from hkd_d2.evaluation.matching import (
    MIN_OVERLAP,
    Curve,
    match,
    match_candidates,
    overlaps,
    rank,
    trace,
)
from hkd_d2.evaluation.protocols import (
    CITYPERSONS,
    MISSING_POINTS,
    ROUNDED_FPPI,
    SETUPS,
    Protocol,
    Setup,
    describe_ranges,
    select_protocol,
    select_setups,
)

__all__ = [
    "COMPILED",
    "HEIGHT_SLACK",
    "MIN_OVERLAP",
    "MISSING_POINTS",
    "PEDESTRIAN",
    "REFERENCE_FPPI",
    "SETUPS",
    "MissRateResult",
    "Setup",
    "SetupMatches",
    "check_detections",
    "check_ground_truth",
    "describe_missing_points",
    "evaluate_miss_rate",
    "format_table",
    "load_detections",
    "load_ground_truth",
    "match_setup",
    "overlaps",
    "select_setups",
    "why_nothing_counts",
]

logger = logging.getLogger(__name__)

HEIGHT_SLACK = CITYPERSONS.height_slack

# The nine values of FPPI, rounded as in the published script.
REFERENCE_FPPI = np.array(ROUNDED_FPPI)
REFERENCE_FPPI.flags.writeable = False


@dataclass(frozen=True, eq=False)
class MissRateResult:
    """The outcome of one setup.

    Attributes:
        setup: the setup that was evaluated.
        miss_rate: MR^-2 in percent; -100.0 where no box is countable, which is what the published
            script prints; :func:`why_nothing_counts` says why.
        num_ground_truth: countable ground-truth boxes.
        num_detections: counted detections, true and false positives; the length of the curve.
        scores: float64 (num_detections,), falling; the threshold of each operating point.
        fppi: float64 (num_detections,), false positives per image.
        miss: float64 (num_detections,), one minus recall; NaN where nothing is countable.
        reference_miss: float64 (9,), the misses read at the protocol's reference values of FPPI;
            NaN likewise.
        missing_points: how many of the nine reference values lie below the first operating point,
            so that the rule of :data:`MISSING_POINTS` decides what is read there.
    """

    setup: Setup
    miss_rate: float
    num_ground_truth: int
    num_detections: int
    scores: np.ndarray
    fppi: np.ndarray
    miss: np.ndarray
    reference_miss: np.ndarray
    missing_points: int = 0


@dataclass(frozen=True, eq=False)
class SetupMatches:
    """Match detections and pedestrians under one setup.

    A detection matches before those of lower score are looked at. So the first k detections match
    as they would alone, and every operating point can be read from one matching.

    Attributes:
        num_images: images of the ground truth.
        detection: int64 (D,), rows of the detections that count, in the order of the curve of
            :class:`MissRateResult`: by falling score.
        annotation: int64 (D,), the row of the annotation that each took; -1 for a false positive.
        pedestrian: int64 (G,), rows of the annotations that are countable, rising.
        detection_box: float64 (all detections, 4), [x, y, w, h], as the protocol cuts and resizes
            them; NaN where the detection plays no part, for example in another category.
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
        detections: COCO results, as :func:`load_detections` returns them. Those of another category
            (:func:`hkd_d2.evaluation.coco_rows.detection_category`) are dropped, as in the
            published script, and a warning says how many.
        setups: names out of the protocol's setups, or setups of your own by name; None for all of
            the protocol's.
        missing_point: a key of :data:`MISSING_POINTS`, the recall at a reference value that lies
            below the first operating point; None for the protocol's. Below 100 images one early
            false positive makes a difference, and a warning says where; from 100 images on none
            does.
        impl: "compiled" for the C++, "reference" for the definition, whose results are the same
            bits; None for the first where it is built.
        protocol: the rules, or a name out of :data:`hkd_d2.evaluation.protocols.PROTOCOLS`.

    Returns:
        A result for each setup, in the order of ``setups``.

    Raises:
        ValueError: on malformed ground truth or detections, naming the row, an unknown setup, an
            unknown ``missing_point``, ``impl`` or ``protocol``.
        RuntimeError: if ``impl`` is "compiled" where it is not.
    """
    protocol = _miss_rate_protocol(protocol)
    missing_point = protocol.missing_point if missing_point is None else missing_point
    if missing_point not in MISSING_POINTS:
        raise ValueError(
            f"missing_point is {missing_point!r}; choose one of {', '.join(MISSING_POINTS)}."
        )
    protocol = replace(protocol, missing_point=missing_point)
    setups = select_setups(setups, protocol)
    compiled = use_compiled(impl)
    truth, found = read_both(ground_truth, detections, protocol, compiled)
    curves = trace(list(setups.values()), truth, found, protocol, compiled)
    results = {
        name: _summarise(setup, curve, protocol)
        for (name, setup), curve in zip(setups.items(), curves, strict=True)
    }
    _warn(results, truth, found, len(detections), protocol)
    return results


def _warn(
    results: Mapping[str, MissRateResult],
    truth: GroundTruth,
    found: Detections,
    num_detections: int,
    protocol: Protocol,
) -> None:
    """Say what makes the numbers other than they look."""
    if len(found.score) < num_detections:
        logger.warning(
            "%d of %d detections have a category_id other than %d, the pedestrians', and do not "
            "count.",
            num_detections - len(found.score),
            num_detections,
            found.category,
        )
    nothing = why_nothing_counts(results, truth)
    if nothing:
        logger.warning("%s Their miss rate of -100 means that there is nothing to find.", nothing)
    if not len(found.score):
        logger.warning("There is no detection of pedestrians, so everybody is missed.")
    elif len(truth.image) and not np.isin(found.image, truth.image).any():
        logger.warning(
            "No detection lies in an image with pedestrians; check that both files have the same "
            "image ids."
        )
    missing = describe_missing_points(results, len(truth.image_index), protocol)
    if missing:
        logger.warning("%s", missing)


def why_nothing_counts(results: Mapping[str, MissRateResult], truth: GroundTruth) -> str:
    """A sentence on the setups that count nobody, and why; empty where each counts somebody.

    Args:
        results: by the setup's name.
        truth: the pedestrians that were evaluated, as
            :func:`hkd_d2.evaluation.coco_rows.read_truth` gives them.
    """
    empty = [name for name, result in results.items() if not result.num_ground_truth]
    if not empty:
        return ""
    boxes, ignored = len(truth.ignore), int(np.count_nonzero(truth.ignore))
    if not boxes:
        why = f"the ground truth has no box of category {truth.category}, the pedestrians"
    elif ignored == boxes:
        why = f"all {boxes} boxes of pedestrians are ignored"
    else:
        height, visibility = truth.height[~truth.ignore], truth.visibility[~truth.ignore]
        why = (
            f"the {boxes - ignored} boxes that the file does not ignore lie outside their ranges "
            f"(heights {height.min():g} to {height.max():g}, visible shares "
            f"{min(visibility.min(), 1):g} to {min(visibility.max(), 1):g})"
        )
    return f"No pedestrian counts in {', '.join(empty)}: {why}."


def describe_missing_points(
    results: Mapping[str, MissRateResult], num_images: int, protocol: Protocol
) -> str:
    """A sentence on the setups that have a missing reference point; empty where none has.

    Args:
        results: by the setup's name.
        num_images: of the ground truth.
        protocol: the rules by which they were computed.
    """
    missing = {name: r.missing_points for name, r in results.items() if r.missing_points}
    if not missing:
        return ""
    points = f"of the {len(protocol.reference_fppi)} reference points"
    lacking = ", ".join(f"{name} lacks {count}" for name, count in missing.items())
    return (
        f"{lacking} {points}, because the curve starts above them: with {num_images} images "
        f"one false positive is {1 / num_images:.3g} per image. There the miss rate hangs on "
        f"the rule {protocol.missing_point!r}: {MISSING_POINTS[protocol.missing_point]}."
    )


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
    truth, found = read_both(ground_truth, detections, protocol)
    annotations = ground_truth["annotations"]
    truth_row = rows_of_category(annotations, truth.category, protocol.labels)
    image = [truth.image_index[annotations[row]["image_id"]] for row in truth_row]
    truth_row = truth_row[np.argsort(image, kind="stable")]  # as read_truth does
    found_row = rows_of_category(detections, found.category)
    order = rank(found, protocol)

    candidates = match_candidates(truth, found.take(order), protocol)
    matching = match(setup, truth, candidates, protocol)
    taken = matching.truth >= 0
    annotation = np.full(len(taken), -1, dtype=np.int64)
    annotation[taken] = truth_row[matching.truth[taken]]
    counted_box = np.where(matching.countable[:, None], truth.counted_box, truth.box)
    return SetupMatches(
        num_images=len(truth.image_index),
        detection=found_row[order][matching.detection],
        annotation=annotation,
        pedestrian=np.sort(truth_row[matching.countable]),
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


def _spread(values: np.ndarray, rows: np.ndarray, length: int) -> np.ndarray:
    """Values at their rows of ``length``, NaN elsewhere."""
    spread = np.full((length, *values.shape[1:]), np.nan)
    spread[rows] = values
    return spread


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


def _summarise(setup: Setup, curve: Curve, protocol: Protocol) -> MissRateResult:
    missing_points = 0
    if curve.num_ground_truth:
        reference_miss = _miss_at_references(curve, protocol)
        if len(curve.fppi):
            missing_points = int(np.searchsorted(protocol.reference_fppi, curve.fppi[0]))
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
        missing_points=missing_points,
    )


def _miss_at_references(curve: Curve, protocol: Protocol) -> np.ndarray:
    reference_fppi = np.array(protocol.reference_fppi)
    if not len(curve.fppi):  # no counted detection
        return np.ones(len(reference_fppi))
    last = np.searchsorted(curve.fppi, reference_fppi, side="right") - 1
    at_reference = curve.miss[last]  # official: -1 wraps around to the last operating point
    wraps = protocol.missing_point == "official"
    return at_reference if wraps else np.where(last < 0, 1.0, at_reference)
