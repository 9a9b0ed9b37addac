"""CrowdHuman's AP, MR^-2 and JI: by hand, and against a twin in plain Python."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.plain_crowdhuman import plain_crowdhuman
from helpers.rules import rule
from hkd_d2.evaluation import PROTOCOLS, evaluate_crowdhuman

pytestmark = rule("CrowdHuman's three scores equal those by hand and by plain Python")

CROWDHUMAN = PROTOCOLS["crowdhuman"]
BOX = (100, 100, 40, 100)
ELSEWHERE = (400, 100, 40, 100)


def truth(people, images=10):
    """``people``: (image, box) or (image, box, ignore)."""
    return {
        "images": [{"id": n, "width": 640, "height": 480} for n in range(1, images + 1)],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": n, "image_id": image, "category_id": 1, "bbox": list(box), "ignore": sum(flag)}
            for n, (image, box, *flag) in enumerate(people)
        ],
    }


def found(*rows):
    return [
        {"image_id": image, "category_id": 1, "bbox": list(box), "score": score}
        for image, box, score in rows
    ]


def test_average_precision_by_hand():
    # TP, FP, TP of 4 people: recall 1/4, 1/4, 1/2 and precision 1, 1/2, 2/3. The area left of the
    # first point is not counted: 0 and 1/4 (1/2 + 2/3) / 2 = 7/48.
    people = [(image, BOX) for image in (1, 2, 3, 4)]
    detections = found((1, BOX, 0.9), (9, BOX, 0.8), (2, BOX, 0.7))
    result = evaluate_crowdhuman(truth(people), detections)
    assert result.ap == pytest.approx(100 * 7 / 48)
    assert (result.num_ground_truth, result.num_detections) == (4, 3)
    # MR: FPPI 0, 0.1, 0.1 and miss 3/4, 3/4, 1/2. The first point with at least the value is the
    # second for 0.01 to 0.1, and for the others, which none reaches, the last one.
    assert result.reference_miss.tolist() == [0.75] * 5 + [0.5] * 4
    assert result.miss_rate == pytest.approx(100 * (0.75**5 * 0.5**4) ** (1 / 9))


def test_overlap_has_to_exceed_one_half():
    people = [(1, BOX)]
    half = (100, 100, 40, 200)
    assert evaluate_crowdhuman(truth(people), found((1, half, 0.9))).miss.tolist() == [1]
    more = (100, 100, 40, 199.9)
    assert evaluate_crowdhuman(truth(people), found((1, more, 0.9))).miss.tolist() == [0]


def test_of_equal_overlaps_the_earlier_box_is_taken():
    # Shifted by 10 from both, overlap 30 / 50 with each: the earlier is taken, so that the second
    # detection, on the later one, is a hit.
    people = [(1, (100, 100, 40, 100)), (1, (120, 100, 40, 100))]
    middle = (1, (110, 100, 40, 100), 0.9)
    result = evaluate_crowdhuman(truth(people), found(middle, (1, people[1][1], 0.8)))
    assert result.miss.tolist() == [0.5, 0]
    result = evaluate_crowdhuman(truth(people), found(middle, (1, people[0][1], 0.8)))
    assert result.miss.tolist() == [0.5, 0.5]


def test_ignored_boxes_absorb_by_more_than_half_of_the_detection():
    people = [(1, (0, 0, 200, 200), 1), (2, BOX)]
    inside, half = (1, (180.1, 0, 39, 100), 0.9), (1, (180, 0, 40, 100), 0.9)
    assert evaluate_crowdhuman(truth(people), found(inside)).num_detections == 0
    assert evaluate_crowdhuman(truth(people), found(half)).num_detections == 1


def test_boxes_are_cut_at_the_edges():
    # 21 of 40 outside on the left; the detection is the part inside.
    people, detections = [(1, (-21, 100, 40, 100))], found((1, (0, 100, 19, 100), 0.9))
    assert evaluate_crowdhuman(truth(people), detections).miss.tolist() == [0]
    plain = replace(CROWDHUMAN, clip_to_image=False)
    assert evaluate_crowdhuman(truth(people), detections, plain).miss.tolist() == [1]


def test_boxes_outside_on_the_right_become_the_last_column():
    people, detections = [(1, (650, 100, 40, 100))], found((1, (700, 100, 40, 100), 0.9))
    assert evaluate_crowdhuman(truth(people), detections).miss.tolist() == [0]


def test_scores_have_to_exceed_the_thresholds():
    # 0.1 * 3 is 0.30000000000000004 in binary, and this score does not exceed it.
    result = evaluate_crowdhuman(truth([(1, BOX)]), found((1, BOX, 0.30000000000000004)))
    assert np.count_nonzero(result.jaccard) == 3


def test_jaccard_index_by_hand():
    # Image 1: two people, one found, a false positive of score 0.15: 1 / (2 + 2 - 1) up to the
    # threshold 0.1, then 1 / (2 + 1 - 1). Image 2: one person, found at 0.35: 1 up to 0.3, then 0.
    # Image 3 has nothing and does not count. Best at 0.2 and 0.3: (1/2 + 1) / 2.
    people = [(1, BOX), (1, ELSEWHERE), (2, BOX)]
    detections = found((1, BOX, 0.9), (1, (250, 300, 40, 100), 0.15), (2, BOX, 0.35))
    result = evaluate_crowdhuman(truth(people, images=3), detections)
    expected = [2 / 3, 2 / 3, 3 / 4, 3 / 4] + [1 / 4] * 5 + [0]
    assert result.jaccard == pytest.approx(expected, abs=1e-5)
    assert result.ji == pytest.approx(75, abs=1e-3)


def test_jaccard_leaves_out_what_lies_in_ignored_boxes():
    # A person and a detection in the ignored region, neither matched: 1 / (1 + 1 - 1) remains.
    people = [(1, BOX), (1, (400, 0, 200, 200), 1), (1, (410, 10, 40, 100))]
    detections = found((1, BOX, 0.9), (1, (500, 60, 40, 100), 0.9))
    assert evaluate_crowdhuman(truth(people), detections).ji == pytest.approx(100, abs=1e-3)


def test_matching_of_greatest_weight_and_of_most_pairs():
    # On a line, 100 high: d1 g1 d2 g2 d3 g3, where d2 is g1 and d3 is g2 exactly, and each of the
    # pairs d1-g1, d2-g2, d3-g3 overlaps by 70 of 130, 0.54. Two pairs weigh 2, three 1.6.
    people = [(1, (x, 100, 100, 100)) for x in (130, 160, 190)]
    detections = found(*((1, (x, 100, 100, 100), 0.95) for x in (100, 130, 160)))
    assert evaluate_crowdhuman(truth(people), detections).ji == pytest.approx(50, abs=1e-3)
    most = replace(CROWDHUMAN, matching="cardinality")
    assert evaluate_crowdhuman(truth(people), detections, most).ji == pytest.approx(100, abs=1e-3)


def test_without_anything_to_find_or_found():
    nothing = evaluate_crowdhuman(truth([(1, BOX, 1)]), found((2, BOX, 0.9)))
    assert all(map(math.isnan, nothing.percent().values()))
    none = evaluate_crowdhuman(truth([(1, BOX)]), [])
    assert none.percent() == {"AP": 0, "MR^-2": 100, "JI": 0}


def test_what_is_refused():
    with pytest.raises(ValueError, match="'caltech' is not CrowdHuman's"):
        evaluate_crowdhuman(truth([]), [], "caltech")
    with pytest.raises(ValueError, match=r"images\[0\] has no 'width'"):
        evaluate_crowdhuman(truth([]) | {"images": [{"id": 1}]}, [])
    with pytest.raises(ValueError, match="detection 0 has score nan"):
        evaluate_crowdhuman(truth([]), found((1, BOX, math.nan)))


BOXES = st.tuples(
    st.sampled_from([-8, 0, 4, 8, 12.5, 620]),
    st.sampled_from([-4, 0, 4, 470]),
    st.sampled_from([0, 8, 12.5, 16, 25]),
    st.sampled_from([0, 8, 10, 16, 20]),
)
IMAGES = st.sampled_from([1, 2, 3])
SCORES = st.sampled_from([0, 0.1, 0.3, 0.30000000000000004, 0.5, 0.95])


@pytest.mark.long
@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    st.lists(st.tuples(IMAGES, BOXES, st.sampled_from([0, 0, 0, 1])), max_size=10),
    st.lists(st.tuples(IMAGES, BOXES, SCORES), max_size=12),
    st.integers(3, 60),
    st.sampled_from(["weight", "cardinality"]),
)
def test_equal_to_plain_python(people, rows, images, matching):
    ground_truth, detections = truth(people, images), found(*rows)
    rules = replace(CROWDHUMAN, matching=matching)
    result = evaluate_crowdhuman(ground_truth, detections, rules)
    expected = plain_crowdhuman(ground_truth, detections, matching)
    if expected is None:
        assert all(map(math.isnan, result.percent().values()))
    else:
        got = np.array(list(result.percent().values())) / 100
        assert got == pytest.approx(expected, abs=1e-12)
