"""Is an exported detector the one that was trained? Compared on frames, detection by detection."""

from collections.abc import Sequence

import numpy as np

from hkd_d2.inference import Detections, Detector

# Bounds of the comparison, ours. Both sides compute in float32, in another order.
BOX_TOLERANCE = 0.05  # pixels of the image that was given
SCORE_TOLERANCE = 1e-4


def verify(reference: Detector, exported: Detector, images: Sequence) -> dict:
    """Compare two detectors on the same images.

    Returns:
        dict: ``images``, ``detections``, and the largest differences ``box`` (pixels) and
            ``score``.

    Raises:
        ValueError: the first detection that differs, of which image, and how; or no detection.
    """
    wanted, found = reference.detect(images), exported.detect(images)
    limit = reference.metadata["max_detections"]
    threshold = reference.metadata["score_threshold"]
    largest = {"box": 0.0, "score": 0.0}
    for number, (ours, theirs) in enumerate(zip(wanted, found, strict=True)):
        name = images[number] if isinstance(images[number], (str, bytes)) else number
        try:
            difference = compare(ours, theirs, threshold, limit)
        except ValueError as error:
            raise ValueError(f"Image {name}: {error}") from error
        largest = {key: max(largest[key], difference[key]) for key in largest}
    total = sum(len(x) for x in wanted)
    if total == 0:
        raise ValueError(
            f"Nothing is detected on the {len(images)} images, so nothing could be compared; give "
            "images with objects, or a lower score threshold."
        )
    return {"images": len(images), "detections": total} | largest


def compare(wanted: Detections, found: Detections, threshold: float, limit: int) -> dict:
    """Compare the detections of one image.

    Each has to be found with the same class, a box within :data:`BOX_TOLERANCE`, a score within
    :data:`SCORE_TOLERANCE`, and in the same place of the order, but for places whose scores lie
    within the tolerance. One at the cut, as near to ``threshold`` or to the last of ``limit``
    detections, may be missing on one side.

    Returns:
        dict: the largest differences, ``box`` and ``score``.

    Raises:
        ValueError: names the first detection that differs.
    """
    free = np.ones(len(found), bool)
    box, score = 0.0, 0.0
    for i in range(len(wanted)):
        near = free & (found.classes == wanted.classes[i])
        near &= np.abs(found.scores - wanted.scores[i]) <= SCORE_TOLERANCE
        gaps = np.abs(found.boxes - wanted.boxes[i]).max(axis=1, initial=0.0)
        near &= gaps <= BOX_TOLERANCE
        if not near.any():
            if _at_the_cut(wanted, i, threshold, limit):
                continue
            raise ValueError(
                f"detection {i} (score {wanted.scores[i]:.6f}, class {wanted.classes[i]}, box "
                f"{wanted.boxes[i].round(3).tolist()}) {_nearest(wanted, i, found, free)}."
            )
        j = min(np.flatnonzero(near), key=lambda j: (abs(j - i), gaps[j]))
        free[j] = False
        box = max(box, float(gaps[j]))
        score = max(score, float(abs(found.scores[j] - wanted.scores[i])))
        # Both sides are sorted, so a row can only have moved over ties; where it stands has to be
        # as good as where it stood.
        if j < len(wanted) and abs(wanted.scores[j] - wanted.scores[i]) > SCORE_TOLERANCE:
            raise ValueError(
                f"detection {i} (score {wanted.scores[i]:.6f}) is at place {j}, which is no tie."
            )
    for j in np.flatnonzero(free):
        if not _at_the_cut(found, j, threshold, limit):
            raise ValueError(
                f"detection {j} (score {found.scores[j]:.6f}, class {found.classes[j]}, box "
                f"{found.boxes[j].round(3).tolist()}) is in the exported file alone."
            )
    return {"box": box, "score": score}


def _at_the_cut(detections, i, threshold, limit):
    cuts = [threshold]
    if 0 <= limit <= len(detections):  # a negative one is none
        cuts.append(float(detections.scores[-1]))
    return any(abs(float(detections.scores[i]) - cut) <= SCORE_TOLERANCE for cut in cuts)


def _nearest(wanted, i, found, free):
    """Difference to the unmatched detection with the nearest box, in words."""
    rows = np.flatnonzero(free)
    if not len(rows):
        return "is missing in the exported file"
    gaps = np.abs(found.boxes[rows] - wanted.boxes[i]).max(axis=1)
    j = rows[gaps.argmin()]
    return (
        f"is not in the exported file; nearest is detection {j}, {gaps.min():.3f} pixels and "
        f"{abs(found.scores[j] - wanted.scores[i]):.6f} of score away, class {found.classes[j]}"
    )
