"""Errors of a detector: misses by size and occlusion, false positives, calibration.

Needs NumPy alone. Matching is the evaluator's own (:func:`hkd_d2.evaluation.match_setup`).

Everything belongs to one setup and, where a threshold is needed, to one operating point:

*Operating point.* The counted detections of the setup stand by falling score, as on its curve. The
operating point at a limit of FPPI is the last one whose FPPI does not exceed the limit: "over the
operating point" are the first k of them and no others, not even one of equal score. So MR^-2 reads
its curve too, but here k is 0, everything missed, where the first detection exceeds the limit.

*Misses.* Countable pedestrians that none of the first k detections took. The miss rate of a range
of heights or visible shares is missed over countable pedestrians in it; the counts of all ranges
sum to the setup's. Matching is done once, not once a range, so a range is no setup of its own.
Visible shares are left out where the ground truth has none.

*False positives.* Counted detections that took no pedestrian and that no ignored box absorbed. By
the highest intersection over union with any box of the ground truth they are a "duplicate" (from
0.5: that pedestrian was taken by a higher score), "misplaced" (from 0.1) or "background". Overlaps
are those of the matching, of boxes as the protocol cuts and resizes them. The bound
0.1 is that of Hoiem, Chodpathumwan and Dai, "Diagnosing Error in Object Detectors", ECCV 2012.

*Calibration.* All counted detections of the setup, in ten ranges of score of equal width, whatever
the operating point. A range's precision is the share of true positives. The expected calibration
error is the mean over ranges of abs(precision - mean score), weighted by the number of detections
(Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, with precision in the place of
accuracy). It is taken from a score of 0.1 on: most boxes of a detector lie below, nobody uses them,
and they would rule the mean.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hkd_d2.evaluation.matching import MIN_OVERLAP, overlaps
from hkd_d2.evaluation.miss_rate import SetupMatches, match_setup
from hkd_d2.evaluation.protocols import CITYPERSONS, Protocol, Setup

__all__ = [
    "FALSE_POSITIVE_KINDS",
    "HEIGHT_EDGES",
    "VISIBILITY_EDGES",
    "Calibration",
    "ErrorAnalysis",
    "FalsePositive",
    "Miss",
    "MissRange",
    "OperatingPoint",
    "ScoreRange",
    "analyze_errors",
    "calibrate",
]

# Ranges hold their lower edge and not their upper one. The bounds of the setups are among the
# edges; the others are ours.
HEIGHT_EDGES = (0, 20, 35, 50, 75, 100, 150, math.inf)
VISIBILITY_EDGES = (0, 0.2, 0.4, 0.65, 0.8, 0.9, math.inf)

FALSE_POSITIVE_KINDS = ("duplicate", "misplaced", "background")
MISPLACED_OVERLAP = 0.1

SCORE_RANGES = 10
CALIBRATION_SCORE = 0.1  # from which the calibration error is taken


@dataclass(frozen=True)
class OperatingPoint:
    """An operating point of a curve.

    Attributes:
        limit: the FPPI that is not exceeded.
        detections: how many counted detections are over it.
        score: the lowest of their scores; None where there is none.
        fppi: false positives per image there.
        found: pedestrians found.
        pedestrians: countable pedestrians.
        false_positives: how many of each of :data:`FALSE_POSITIVE_KINDS`.
    """

    limit: float
    detections: int
    score: float | None
    fppi: float
    found: int
    pedestrians: int
    false_positives: dict[str, int]

    @property
    def miss_rate(self) -> float:
        """Missed over countable pedestrians."""
        return 1 - self.found / self.pedestrians


@dataclass(frozen=True)
class MissRange:
    """Pedestrians of one range of height or visible share, ``low <= value < high``.

    Attributes:
        low, high: the edges; ``high`` may be infinite.
        pedestrians: countable ones in the range.
        missed: those of them that were not found.
    """

    low: float
    high: float
    pedestrians: int
    missed: int

    @property
    def miss_rate(self) -> float | None:
        """Missed over countable pedestrians; None where there are none."""
        return self.missed / self.pedestrians if self.pedestrians else None


@dataclass(frozen=True)
class ScoreRange:
    """Detections of one range of score, ``low <= score < high``; 1 belongs to the last.

    Attributes:
        low, high: the edges.
        detections: how many.
        mean_score, precision: their mean score and their share of true positives; None where there
            are none.
    """

    low: float
    high: float
    detections: int
    mean_score: float | None
    precision: float | None


@dataclass(frozen=True)
class Calibration:
    """Precision by score.

    Attributes:
        ranges: all of them.
        error: expected calibration error, 0 to 1, over detections from ``min_score`` on; NaN
            where there are none.
        min_score: see above.
    """

    ranges: list[ScoreRange]
    error: float
    min_score: float


@dataclass(frozen=True)
class FalsePositive:
    """A detection that found nothing.

    Attributes:
        detection: its row in the detections.
        image_id: of its image.
        box: [x, y, w, h] in pixels.
        score: of the detection.
        overlap: highest intersection over union with any box of the ground truth.
        kind: one of :data:`FALSE_POSITIVE_KINDS`.
    """

    detection: int
    image_id: int
    box: list[float]
    score: float
    overlap: float
    kind: str


@dataclass(frozen=True)
class Miss:
    """A pedestrian that was not found.

    Attributes:
        annotation: its row in the annotations.
        image_id: of its image.
        box: [x, y, w, h] in pixels.
        height: in pixels, as the protocol reads it.
        visibility: visible share; None where the ground truth has none.
        overlap: highest intersection over union with any detection that scores at least as high as
            the operating point; such a detection may have taken a neighbour.
        score: of the detection that takes it below the operating point; None where none does.
    """

    annotation: int
    image_id: int
    box: list[float]
    height: float
    visibility: float | None
    overlap: float
    score: float | None


@dataclass(frozen=True)
class ErrorAnalysis:
    """The errors of one detector under one setup; the terms are defined in this module's docstring.

    Attributes:
        setup: which pedestrians count.
        operating_point: where the misses and the counts of false positives belong.
        by_height, by_visibility: misses in the ranges of :data:`HEIGHT_EDGES` and
            :data:`VISIBILITY_EDGES`; the second is empty where the ground truth has no visible
            shares.
        calibration: None where a score lies outside 0 to 1.
        worst_false_positives: those of highest score, whatever the operating point.
        worst_misses: those of largest height times visible share.
        pedestrians: rows of the annotations that count.
    """

    setup: Setup
    operating_point: OperatingPoint
    by_height: list[MissRange]
    by_visibility: list[MissRange]
    calibration: Calibration | None
    worst_false_positives: list[FalsePositive]
    worst_misses: list[Miss]
    pedestrians: frozenset[int]

    def to_json(self) -> dict[str, Any]:
        """The same as plain lists, dicts and numbers, but for ``pedestrians``.

        Infinite edges and NaN become None.
        """
        content = asdict(self)
        del content["pedestrians"]
        content["operating_point"]["miss_rate"] = self.operating_point.miss_rate
        for key in ("by_height", "by_visibility"):
            for row, part in zip(content[key], getattr(self, key), strict=True):
                row["miss_rate"] = part.miss_rate
        return _finite(content)


def analyze_errors(
    ground_truth: Mapping[str, Any],
    detections: list[dict[str, Any]],
    setup: Setup,
    fppi: float = 0.1,
    worst: int = 24,
    protocol: Protocol | str = CITYPERSONS,
) -> ErrorAnalysis:
    """Sort out what a detector gets wrong. The arguments are not changed.

    Args:
        ground_truth: COCO-style, as :func:`hkd_d2.evaluation.load_ground_truth` returns it.
        detections: COCO results, as :func:`hkd_d2.evaluation.load_detections` returns them.
        setup: which pedestrians count.
        fppi: false positives per image of the operating point.
        worst: at most so many false positives and misses are listed.
        protocol: the rules, or a name out of :data:`hkd_d2.evaluation.protocols.PROTOCOLS`.

    Raises:
        ValueError: malformed input, naming the row; no countable pedestrian; no detection of
            pedestrians; an ``fppi`` that is not positive; a negative ``worst``.
    """
    if not 0 < fppi < math.inf:
        raise ValueError(f"fppi is {fppi!r}; give a positive number of false positives per image.")
    if worst < 0:
        raise ValueError(f"worst is {worst!r}; give 0 or more.")
    matches = match_setup(ground_truth, detections, setup, protocol)
    annotations = ground_truth["annotations"]
    if not len(matches.pedestrian):
        raise ValueError("The setup counts no pedestrian of the ground truth; choose another.")
    if np.isnan(matches.detection_box[:, 0]).all():
        raise ValueError(
            "There is no detection of pedestrians; check the detector's score threshold and its "
            "category ids."
        )

    over = int(np.searchsorted(matches.fppi, fppi, side="right"))
    score = float(detections[matches.detection[over - 1]]["score"]) if over else None
    found = set(matches.annotation[:over].tolist()) - {-1}
    missed = [row for row in matches.pedestrian.tolist() if row not in found]
    has_visibility = any("vis_ratio" in annotations[row] for row in matches.pedestrian.tolist())
    visibility = np.minimum(matches.visibility, 1) if has_visibility else None
    wrong = _false_positives(matches, over, worst, detections, annotations)
    # By falling score, so those over the operating point are the first.
    kinds = [entry.kind for entry in wrong[: np.count_nonzero(matches.annotation[:over] < 0)]]
    is_missed = np.isin(matches.pedestrian, missed)
    return ErrorAnalysis(
        setup=setup,
        operating_point=OperatingPoint(
            limit=fppi,
            detections=over,
            score=score,
            fppi=float(matches.fppi[over - 1]) if over else 0.0,
            found=len(found),
            pedestrians=len(matches.pedestrian),
            false_positives={kind: kinds.count(kind) for kind in FALSE_POSITIVE_KINDS},
        ),
        by_height=_ranges(matches.height[matches.pedestrian], is_missed, HEIGHT_EDGES),
        by_visibility=[]
        if visibility is None
        else _ranges(visibility[matches.pedestrian], is_missed, VISIBILITY_EDGES),
        calibration=_calibration(matches, detections),
        worst_false_positives=wrong[:worst],
        worst_misses=_worst_misses(
            matches, missed, score, worst, detections, annotations, visibility
        ),
        pedestrians=frozenset(matches.pedestrian.tolist()),
    )


def calibrate(
    scores: np.ndarray, true_positive: np.ndarray, min_score: float = CALIBRATION_SCORE
) -> Calibration:
    """Precision in ten ranges of score, and the expected calibration error.

    Args:
        scores: (D,), from 0 to 1.
        true_positive: bool (D,).
        min_score: the error is taken from the ranges whose lower edge is at least this.

    Raises:
        ValueError: a score outside 0 to 1.
    """
    scores, true_positive = np.asarray(scores, float), np.asarray(true_positive, bool)
    if ((scores < 0) | (scores > 1)).any():
        raise ValueError("A score lies outside 0 to 1; calibration is defined for probabilities.")
    edges = np.arange(SCORE_RANGES + 1) / SCORE_RANGES
    place = np.searchsorted(edges[1:-1], scores, side="right")
    ranges, error, weighed = [], 0.0, 0
    for number, (low, high) in enumerate(pairwise(edges.tolist())):
        inside = place == number
        count = int(np.count_nonzero(inside))
        mean_score = float(scores[inside].mean()) if count else None
        precision = float(true_positive[inside].mean()) if count else None
        if count and low >= min_score:
            error += count * abs(precision - mean_score)
            weighed += count
        ranges.append(ScoreRange(low, high, count, mean_score, precision))
    return Calibration(ranges, error / weighed if weighed else math.nan, min_score)


def _calibration(matches: SetupMatches, detections: list) -> Calibration | None:
    scores = np.array([detections[row]["score"] for row in matches.detection], dtype=float)
    if ((scores < 0) | (scores > 1)).any():
        return None
    return calibrate(scores, matches.annotation >= 0)


def _ranges(values: np.ndarray, is_missed: np.ndarray, edges: Iterable[float]) -> list[MissRange]:
    return [
        MissRange(
            low, high, int(np.count_nonzero(inside)), int(np.count_nonzero(inside & is_missed))
        )
        for low, high in pairwise(edges)
        for inside in [(values >= low) & (values < high)]
    ]


def _false_positives(
    matches: SetupMatches, over: int, worst: int, detections: list, annotations: list
) -> list[FalsePositive]:
    """By falling score: all over the operating point, and on to the ``worst``."""
    wrong = np.flatnonzero(matches.annotation < 0)
    wrong = wrong[(wrong < over) | (np.arange(len(wrong)) < worst)]
    truth = _boxes_by_image(annotations, matches.annotation_box)
    return [
        FalsePositive(
            detection=row,
            image_id=int(detections[row]["image_id"]),
            box=[float(value) for value in detections[row]["bbox"]],
            score=float(detections[row]["score"]),
            overlap=overlap,
            kind=_kind(overlap),
        )
        for row in matches.detection[
            wrong[(wrong < over) | (np.arange(len(wrong)) < worst)]
        ].tolist()
        for overlap in [_highest(matches.detection_box[row], truth[detections[row]["image_id"]])]
    ]


def _kind(overlap: float) -> str:
    if overlap >= MIN_OVERLAP:
        return "duplicate"
    return "misplaced" if overlap >= MISPLACED_OVERLAP else "background"


def _worst_misses(
    matches: SetupMatches,
    missed: list[int],
    score: float | None,
    worst: int,
    detections: list,
    annotations: list,
    visibility: np.ndarray | None,
) -> list[Miss]:
    visible_height = matches.height if visibility is None else matches.height * visibility
    later = dict(zip(matches.annotation.tolist(), matches.detection.tolist(), strict=True))
    over = [score is not None and row["score"] >= score for row in detections]
    boxes = _boxes_by_image(
        [row for row, is_over in zip(detections, over, strict=True) if is_over],
        matches.detection_box[np.array(over, dtype=bool)],
    )
    return [
        Miss(
            annotation=row,
            image_id=int(annotations[row]["image_id"]),
            box=[float(value) for value in annotations[row]["bbox"]],
            height=float(matches.height[row]),
            visibility=None if visibility is None else float(visibility[row]),
            overlap=_highest(matches.annotation_box[row], boxes[annotations[row]["image_id"]]),
            score=float(detections[later[row]]["score"]) if row in later else None,
        )
        for row in sorted(missed, key=visible_height.__getitem__, reverse=True)[:worst]
    ]


def _boxes_by_image(rows: list[dict[str, Any]], boxes: np.ndarray) -> dict[int, list]:
    """Boxes of the rows that play a part, which are no NaN, by image id."""
    by_image = defaultdict(list)
    for row in np.flatnonzero(~np.isnan(boxes[:, 0])).tolist():
        by_image[rows[row]["image_id"]].append(boxes[row])
    return by_image


def _highest(box: np.ndarray, others: list[np.ndarray]) -> float:
    """Highest intersection over union of a box with others; 0 where there are none."""
    if not others:
        return 0.0
    over_union, _ = overlaps(box[None], np.array(others))
    return float(over_union.max())


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
