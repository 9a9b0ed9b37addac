"""The comparison finds what differs, and lets pass what is a tie."""

import numpy as np
import pytest

from helpers.rules import rule
from hkd_d2.export.verification import compare, verify
from hkd_d2.inference import Detections

pytestmark = rule("An exported file finds what Detectron2 finds, or is not written")


def detections(rows):
    """Of (x, score, class)."""
    x = np.array([r[0] for r in rows], np.float32)
    boxes = np.stack([x, x, x + 20, x + 50], axis=1).reshape(-1, 4)
    scores = np.array([r[1] for r in rows], np.float32)
    return Detections(boxes, scores, np.array([r[2] for r in rows], np.int64), ("a", "b"))


ROWS = [(0, 0.9, 0), (100, 0.8, 1), (200, 0.5, 0), (300, 0.30005, 0), (400, 0.3, 0)]


def check(rows, wanted=ROWS, threshold=0.05, limit=100):
    return compare(detections(wanted), detections(rows), threshold, limit)


def changed(i, row):
    return [row if j == i else other for j, other in enumerate(ROWS)]


def test_differences_are_reported():
    found = check(changed(1, (100.04, 0.80005, 1)))
    assert found["box"] == pytest.approx(0.04, abs=1e-4)
    assert found["score"] == pytest.approx(5e-5, abs=1e-6)


@pytest.mark.parametrize(
    "rows, sentence",
    [
        (changed(2, (200.06, 0.5, 0)), "detection 2 .*0.060 pixels and 0.000000 of score away"),
        (changed(2, (200, 0.5002, 0)), "detection 2 .*0.000 pixels and 0.000200 of score away"),
        (changed(1, (100, 0.8, 0)), "detection 1 .*class 0"),
        (ROWS[:2] + ROWS[3:], "detection 2 "),
        (ROWS[:3] + [(250, 0.4, 0)] + ROWS[3:], "detection 3 .* in the exported file alone"),
        ([ROWS[0], ROWS[2], ROWS[1], *ROWS[3:]], "detection 1 .*is at place 2"),
        ([], "detection 0 .*missing"),
        ([ROWS[0], ROWS[0], *ROWS[2:]], "detection 1 "),
    ],
)
def test_what_differs(rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(rows)


def test_ties_may_change_places():
    check([*ROWS[:3], ROWS[4], ROWS[3]])


def test_at_the_cut_one_may_be_missing():
    # The last stands at the threshold, or at the last place of a full list.
    check(ROWS[:4], threshold=0.29995)
    check(ROWS, wanted=ROWS[:4], threshold=0.29995)
    with pytest.raises(ValueError, match="detection 4"):
        check(ROWS[:4], threshold=0.2)
    check([*ROWS[:4], (500, 0.3, 0)], limit=5)
    with pytest.raises(ValueError, match="detection 4"):
        check([*ROWS[:4], (500, 0.3, 0)], limit=6)


def test_nothing_compared_is_no_success():
    class Blind:
        metadata = {"max_detections": 100, "score_threshold": 0.5}

        def detect(self, images):
            return [detections([]) for _ in images]

    with pytest.raises(ValueError, match="Nothing is detected on the 3 images"):
        verify(Blind(), Blind(), [None] * 3)
