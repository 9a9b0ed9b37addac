"""Matching of detections with ground truth, and the operating points that follow from it.

These are steps 3 to 6 of :mod:`hkd_d2.evaluation.miss_rate`. The functions in NumPy and plain
Python are the definition ("reference"); :func:`trace` may run the compiled matcher
(``csrc/evaluation/miss_rate.cpp``) in their place, whose results are the same bits.
"""

import math
from dataclasses import dataclass

import numpy as np

from hkd_d2.evaluation.coco_rows import Detections, GroundTruth
from hkd_d2.evaluation.compiled import trace_setups
from hkd_d2.evaluation.protocols import Protocol, Setup

__all__ = [
    "MIN_OVERLAP",
    "Candidates",
    "Curve",
    "Matching",
    "countable",
    "match",
    "match_candidates",
    "overlaps",
    "rank",
    "trace",
]

MIN_OVERLAP = 0.5
COMPILED_SETUPS = 64  # of one pass of the compiled matcher


@dataclass(frozen=True, eq=False)
class Curve:
    """The operating points of one setup; see :class:`~hkd_d2.evaluation.MissRateResult`."""

    num_ground_truth: int
    scores: np.ndarray
    fppi: np.ndarray
    miss: np.ndarray


@dataclass(frozen=True, eq=False)
class Candidates:
    """Pairs of a detection and a ground-truth box that overlap enough to match in some setup.

    Pairs are in the order in which matching tries them: by detection (image, then falling score),
    then falling intersection over union, of equals the later ground truth first.
    """

    detections: Detections
    detection: np.ndarray  # int64 (P,), index into detections
    truth: np.ndarray  # int64 (P,), index into the ground truth
    matches: np.ndarray  # bool (P,), the overlap is enough where the ground truth is countable
    absorbs: np.ndarray  # bool (P,), the overlap is enough where it is ignored


@dataclass(frozen=True, eq=False)
class Matching:
    """The counted detections of one setup by falling score, and what each took."""

    detection: np.ndarray  # int64 (D,), index into the candidates' detections
    truth: np.ndarray  # int64 (D,), index into the ground truth; -1 for a false positive
    countable: np.ndarray  # bool (G,), ground truth that counts in this setup


def trace(
    setups: list[Setup],
    truth: GroundTruth,
    detections: Detections,
    protocol: Protocol,
    compiled: bool,
) -> list[Curve]:
    """The curve of each setup."""
    # The compiled matcher does not know of pedestrians whose match is a false positive.
    run = _trace_compiled if compiled and not truth.unmatched.any() else _trace_reference
    return run(setups, truth, detections, protocol)


def _trace_compiled(
    setups: list[Setup], truth: GroundTruth, detections: Detections, protocol: Protocol
) -> list[Curve]:
    most = np.iinfo(np.int64).max
    curves = []
    for first in range(0, len(setups), COMPILED_SETUPS):
        part = setups[first : first + COMPILED_SETUPS]
        counts = np.zeros(len(truth.image), dtype=np.uint64)
        for bit, setup in enumerate(part):
            counts |= countable(setup, truth, protocol).astype(np.uint64) << np.uint64(bit)
        curves += trace_setups(
            truth.image,
            truth.box,
            truth.counted_box,
            truth.region,
            counts,
            detections.image,
            detections.box,
            detections.score,
            heights=np.array([_first_and_end(setup, protocol) for setup in part]),
            images=len(truth.image_index),
            max_detections=most if protocol.max_detections is None else protocol.max_detections,
            min_overlap=MIN_OVERLAP,
        )
    return [Curve(*curve) for curve in curves]


def _trace_reference(
    setups: list[Setup], truth: GroundTruth, detections: Detections, protocol: Protocol
) -> list[Curve]:
    ranked = detections.take(rank(detections, protocol))
    candidates = match_candidates(truth, ranked, protocol)
    return [_trace_setup(setup, truth, candidates, protocol) for setup in setups]


def rank(detections: Detections, protocol: Protocol) -> np.ndarray:
    """Indices by image, then falling score, each image cut to the first that count."""
    order = np.lexsort((-detections.score, detections.image))  # ties stay in the order of the file
    if protocol.max_detections is None:
        return order
    image = detections.image[order]
    place = np.arange(len(image)) - np.searchsorted(image, image)  # within the image
    return order[place < protocol.max_detections]


def match_candidates(truth: GroundTruth, detections: Detections, protocol: Protocol) -> Candidates:
    """Pairs that overlap enough, of detections as :func:`rank` orders them."""
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
    return Candidates(
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


def match(setup: Setup, truth: GroundTruth, candidates: Candidates, protocol: Protocol) -> Matching:
    """Match under one setup: what each detection that counts took."""
    detections = candidates.detections
    counts = countable(setup, truth, protocol)
    height = detections.box[:, 3]
    kept = np.ones(len(height), dtype=bool)
    if protocol.height_slack is not None:
        low = setup.height[0] / protocol.height_slack
        kept = height > low if protocol.lowest_is_dropped else height >= low
        kept &= height < setup.height[1] * protocol.height_slack

    may_count = counts[candidates.truth]
    may_match = candidates.matches & may_count & kept[candidates.detection]
    matched = np.full(len(height), -1, dtype=np.int64)
    taken = np.zeros(len(counts), dtype=bool)
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
    took = matched[counted]
    if truth.unmatched.any():
        took[(took >= 0) & truth.unmatched[took]] = -1  # at -1 it does not matter what is read
    return Matching(detection=counted, truth=took, countable=counts)


def countable(setup: Setup, truth: GroundTruth, protocol: Protocol) -> np.ndarray:
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
    setup: Setup, truth: GroundTruth, candidates: Candidates, protocol: Protocol
) -> Curve:
    matching = match(setup, truth, candidates, protocol)
    true_positive = matching.truth >= 0
    num_ground_truth = int(np.count_nonzero(matching.countable))
    if num_ground_truth:
        miss = 1 - np.cumsum(true_positive) / num_ground_truth
    else:
        miss = np.full(len(true_positive), np.nan)
    return Curve(
        num_ground_truth=num_ground_truth,
        scores=candidates.detections.score[matching.detection],
        fppi=np.cumsum(~true_positive) / len(truth.image_index),
        miss=miss,
    )
