"""AP, MR^-2 and JI of person detections, as CrowdHuman's evaluation has them.

The numbers are not comparable with those of :mod:`hkd_d2.evaluation.miss_rate`: here overlaps have
to exceed one half, and the curve is read at the first operating point with *at least* the reference
FPPI. The rules are those of CrowdDet's ``lib/evaluate`` (Chu et al., "Detection in Crowded Scenes",
CVPR 2020; the table of sources is in :mod:`hkd_d2.evaluation.protocols`):

1.  Boxes of both sides are cut at the image's edges: the corner x0, y0 to the range from 0 to the
    side less 1, the corner x1, y1 to the range from 0 to the side.
2.  Overlap with a person is intersection over union, with an ignored box intersection over the
    detection's area; 1e-6 is added to each denominator.
3.  Per image, by falling score (stable): a detection takes the person, not yet taken, of largest
    overlap > 0.5 (of equals, the earlier in the file). Failing that, an ignored box with overlap
    > 0.5 absorbs it, any number of times. Otherwise it is a false positive.
4.  All images together, by falling score (stable; equals in the order of images and files). AP is
    the area under precision over recall by trapezoids between operating points; the area left of
    the first point is not counted.
5.  MR^-2 is the geometric mean of the misses at nine values of FPPI from 0.01 to 1, each read at
    the first operating point whose FPPI is not below the value, or at the last one.
6.  JI (Jaccard index): for the detections above each score threshold 0, 0.1 ... 0.9, each image's
    pairs of overlap > 0.5 are matched one to one, for the greatest sum of overlaps. Of k pairs, m
    persons and n detections, k / (m + n - k + 1e-6) is the image's index; unmatched persons and
    detections that lie by more than half of their own area in an ignored box are not counted in m
    and n. The mean is over images with any m or n, and JI is the best threshold's.

Needs NumPy, and SciPy for the matching of the Jaccard index.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from hkd_d2.evaluation.coco_rows import read_found, read_truth
from hkd_d2.evaluation.protocols import CrowdHumanProtocol, select_protocol

__all__ = ["SCORE_THRESHOLDS", "CrowdHumanResult", "evaluate_crowdhuman"]

SCORE_THRESHOLDS = tuple(0.1 * step for step in range(10))  # 0.1 * 3 is not 0.3; theirs neither


@dataclass(frozen=True, eq=False)
class CrowdHumanResult:
    """The three scores, and what they are read from.

    Attributes:
        ap, miss_rate, ji: AP, MR^-2 and JI in percent; NaN where no person is countable.
        num_ground_truth: countable persons.
        num_detections: counted detections, true and false positives; the length of the curve.
        scores: float64 (num_detections,), falling; the threshold of each operating point.
        fppi: float64 (num_detections,), false positives per image.
        miss: float64 (num_detections,), one minus recall.
        precision: float64 (num_detections,).
        reference_miss: float64 (9,), the misses that MR^-2 is the mean of.
        jaccard: float64 (10,), the mean index at each of :data:`SCORE_THRESHOLDS`, 0 to 1.
    """

    ap: float
    miss_rate: float
    ji: float
    num_ground_truth: int
    num_detections: int
    scores: np.ndarray
    fppi: np.ndarray
    miss: np.ndarray
    precision: np.ndarray
    reference_miss: np.ndarray
    jaccard: np.ndarray

    def percent(self) -> dict[str, float]:
        """The scores by their names."""
        return {"AP": self.ap, "MR^-2": self.miss_rate, "JI": self.ji}


def evaluate_crowdhuman(
    ground_truth: Mapping[str, Any],
    detections: list[dict[str, Any]],
    protocol: CrowdHumanProtocol | str = "crowdhuman",
) -> CrowdHumanResult:
    """Compute CrowdHuman's three scores. The arguments are not changed.

    Args:
        ground_truth: COCO-style; images have ``width`` and ``height``, annotations have
            ``bbox`` (the full body) and, where they are not 0, ``ignore`` and ``iscrowd``.
        detections: COCO results; those of other categories do not count.
        protocol: the rules.

    Raises:
        ValueError: on malformed ground truth or detections, naming the row.
    """
    protocol = select_protocol(protocol)
    if not isinstance(protocol, CrowdHumanProtocol):
        raise ValueError(
            f"protocol {protocol.name!r} is not CrowdHuman's; call evaluate_miss_rate."
        )
    truth = read_truth(ground_truth, "ground truth", protocol)
    found = read_found(detections, truth, "detections")
    boxes, people = _corners(found.box), _corners(truth.box)
    if protocol.clip_to_image:
        boxes = _cut(boxes, truth.image_size[found.image])
        people = _cut(people, truth.image_size[truth.image])
    ignore = truth.ignore

    order = np.lexsort((-found.score, found.image))
    images = np.arange(len(truth.image_index) + 1)
    first_found = np.searchsorted(found.image[order], images)
    first_person = np.searchsorted(truth.image, images)
    hits, scores = [np.zeros(0, dtype=bool)], [np.zeros(0)]
    index = np.zeros((len(images) - 1, len(SCORE_THRESHOLDS)))
    has_any = np.zeros(index.shape, dtype=bool)
    for image in images[:-1]:
        rows = order[first_found[image] : first_found[image + 1]]
        part = slice(first_person[image], first_person[image + 1])
        crowd = _Crowd(boxes[rows], people[part], ignore[part], protocol)
        hit, counted = crowd.match()
        hits.append(hit[counted])
        scores.append(found.score[rows][counted])
        for column, threshold in enumerate(SCORE_THRESHOLDS):
            # Sorted by score: those above the threshold are the first.
            above = int(np.count_nonzero(found.score[rows] > threshold))
            index[image, column], has_any[image, column] = crowd.jaccard(above)

    num_ground_truth = int(np.count_nonzero(~ignore))
    score = np.concatenate(scores)
    ranked = np.argsort(-score, kind="stable")
    hit = np.concatenate(hits)[ranked]
    true_positives, false_positives = np.cumsum(hit), np.cumsum(~hit)
    recall = true_positives / num_ground_truth if num_ground_truth else np.full(len(hit), np.nan)
    precision = true_positives / (true_positives + false_positives)
    fppi = false_positives / len(truth.image_index)
    miss = 1 - recall
    reference_miss = _miss_at_references(fppi, miss, protocol.reference_fppi)
    counted_images = has_any.sum(axis=0)
    jaccard = index.sum(axis=0) / np.maximum(counted_images, 1)
    average_precision = np.sum(np.diff(recall) * (precision[:-1] + precision[1:]) / 2)
    nothing = num_ground_truth == 0
    with np.errstate(divide="ignore"):  # perfect recall: log 0, and a miss rate of 0
        miss_rate = np.exp(np.mean(np.log(reference_miss)))
    return CrowdHumanResult(
        ap=float("nan") if nothing else float(average_precision) * 100,
        miss_rate=float("nan") if nothing else float(miss_rate) * 100,
        ji=float("nan") if nothing else float(jaccard.max()) * 100,
        num_ground_truth=num_ground_truth,
        num_detections=len(hit),
        scores=score[ranked],
        fppi=fppi,
        miss=miss,
        precision=precision,
        reference_miss=reference_miss,
        jaccard=jaccard,
    )


class _Crowd:
    """One image: its detections by falling score, (D, 4), and its ground truth, (G, 4)."""

    def __init__(self, boxes, people, ignore, protocol: CrowdHumanProtocol):
        self._protocol = protocol
        persons, ignored = people[~ignore], people[ignore]
        self._overlap, _ = _overlaps(boxes, persons, protocol.epsilon)
        self._in_ignored = self._lies_in(boxes, ignored)
        self._person_in_ignored = self._lies_in(persons, ignored)

    def _lies_in(self, boxes: np.ndarray, ignored: np.ndarray) -> np.ndarray:
        _, over_own = _overlaps(boxes, ignored, self._protocol.epsilon)
        return (over_own > self._protocol.min_overlap).any(axis=1)

    def match(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks of the detections that match a person and of those that count, bool (D,) each."""
        free = np.where(self._overlap > self._protocol.min_overlap, self._overlap, 0)
        hit = np.zeros(len(free), dtype=bool)
        if free.shape[1]:
            for row in np.flatnonzero(free.any(axis=1)):
                best = free[row].argmax()  # of equals the first
                if free[row, best] > 0:
                    hit[row] = True
                    free[:, best] = 0
        return hit, hit | ~self._in_ignored

    def jaccard(self, above: int) -> tuple[float, bool]:
        """The index of the first ``above`` detections, and whether there is anything to count."""
        detection, person = self._pairs(self._overlap[:above])
        pairs = len(detection)
        persons = self._overlap.shape[1]
        persons -= np.count_nonzero(np.delete(self._person_in_ignored, person))
        found = above - np.count_nonzero(np.delete(self._in_ignored[:above], detection))
        index = pairs / (persons + found - pairs + self._protocol.epsilon)
        return index, bool(persons or found)

    def _pairs(self, overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the pairs that are matched."""
        enough = overlap > self._protocol.min_overlap
        if not enough.any():
            return np.zeros(0, dtype=int), np.zeros(0, dtype=int)
        optimize, sparse = _import_scipy()
        if self._protocol.matching == "cardinality":
            column = sparse.csgraph.maximum_bipartite_matching(
                sparse.csr_array(enough), perm_type="column"
            )
            rows = np.flatnonzero(column >= 0)
            return rows, column[rows]
        # Pairs that overlap too little weigh nothing, so that they never displace another.
        rows, columns = optimize.linear_sum_assignment(np.where(enough, overlap, 0), maximize=True)
        kept = enough[rows, columns]
        return rows[kept], columns[kept]


def _import_scipy() -> tuple[ModuleType, ModuleType]:
    # On first use: every other score needs NumPy alone, and SciPy takes a quarter of a second.
    try:
        import scipy.optimize
        import scipy.sparse.csgraph
    except ModuleNotFoundError:
        raise ImportError(
            "CrowdHuman's scores need SciPy, which is not installed; run 'pip install scipy'."
        ) from None
    return scipy.optimize, scipy.sparse


def _miss_at_references(fppi: np.ndarray, miss: np.ndarray, references) -> np.ndarray:
    if not len(fppi):  # no counted detection
        return np.ones(len(references))
    first = np.searchsorted(fppi, references, side="left")
    return miss[np.minimum(first, len(fppi) - 1)]


def _corners(boxes: np.ndarray) -> np.ndarray:
    """[x, y, w, h] to [x0, y0, x1, y1]."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _cut(corners: np.ndarray, image_size: np.ndarray) -> np.ndarray:
    low = np.minimum(corners[:, :2].clip(min=0), image_size - 1)
    high = np.minimum(corners[:, 2:], image_size).clip(min=0)
    return np.concatenate([low, high], axis=1)


def _overlaps(
    boxes: np.ndarray, others: np.ndarray, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Intersection over union and over the first boxes' own area, (D, 4) and (G, 4) to (D, G)."""
    boxes = boxes[:, None]
    sides = np.minimum(boxes[..., 2:], others[:, 2:]) - np.maximum(boxes[..., :2], others[:, :2])
    sides = sides.clip(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    other_area = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    return (
        intersection / (area + other_area - intersection + epsilon),
        intersection / (area + epsilon),
    )
