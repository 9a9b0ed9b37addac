"""Error analysis by hand, and its matching against the curves."""

import json
import math

import numpy as np
import pytest

from helpers.rules import rule
from hkd_d2.evaluation import SETUPS, Setup, evaluate_miss_rate, match_setup
from hkd_d2.evaluation.analysis import HEIGHT_EDGES, analyze_errors, calibrate

EVERYONE = Setup((20, 1e10), (0, 1e10))


def person(image, box, vis=1.0, ignore=0):
    return {
        "image_id": image,
        "category_id": 1,
        "bbox": list(box),
        "height": box[3],
        "vis_ratio": vis,
        "ignore": ignore,
    }


def truth(people, images=10):
    return {
        "images": [{"id": number} for number in range(1, images + 1)],
        "categories": [{"id": 1, "name": "pedestrian"}],
        "annotations": [row | {"id": number} for number, row in enumerate(people, 1)],
    }


def found(image, box, score, category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def test_the_protocols_boxes_and_counts():
    """Under caltech boxes get the width 0.41 h and those at the border are ignored.

    The person of 40x100 becomes 41x100 about x = 220, the detection of 100x100 too: an overlap of
    1 in the place of 0.4. The second detection lies on it 70 pixels lower: 30 / 170. Who leaves x
    4 to 634 is ignored and absorbs.
    """
    people = [person(1, (200, 100, 40, 100)), person(2, (1, 100, 40, 100))]
    detections = [
        found(1, (170, 100, 100, 100), 0.9),
        found(1, (200, 170, 40, 100), 0.8),
        found(2, (1, 100, 40, 100), 0.7),
    ]
    errors = analyze_errors(truth(people), detections, EVERYONE, protocol="caltech")
    assert errors.pedestrians == {0} and errors.operating_point.found == 1
    (wrong,) = errors.worst_false_positives
    assert wrong.kind == "misplaced" and wrong.overlap == pytest.approx(30 / 170)
    assert wrong.box == [200, 170, 40, 100]  # shown as the file has it
    # A person without a visible box lies over every range that ends, and is wholly visible.
    assert [part.pedestrians for part in errors.by_visibility] == [0, 0, 0, 0, 0, 1]
    errors = analyze_errors(truth(people), detections, EVERYONE, fppi=0.01)
    assert errors.pedestrians == {0, 1} and errors.operating_point.found == 0
    assert errors.worst_misses[0].overlap == 0


# Ten images. Rows of people and of detections are not in the order of images on purpose.
PEOPLE = [
    person(3, (0, 0, 40, 100)),  # 0: found at 0.9
    person(1, (0, 0, 40, 100), vis=0.5),  # 1: found at 0.6, after one false positive
    person(1, (200, 0, 20, 50), vis=0.8),  # 2: taken at 0.3, under the operating point
    person(2, (0, 0, 60, 160)),  # 3: never found; 0.6 lies on it with an overlap of 0.25
    person(2, (300, 0, 80, 80), ignore=1),  # 4: absorbs
    person(5, (0, 0, 4, 10)),  # 5: under 20 pixels, ignored
]
DETECTIONS = [
    found(1, (200, 0, 20, 50), 0.3),  # 0: takes 2
    found(3, (0, 0, 40, 100), 0.9),  # 1: takes 0
    found(3, (0, 0, 40, 100), 0.8),  # 2: duplicate of 1
    found(2, (310, 10, 20, 40), 0.95),  # 3: absorbed by 4
    found(1, (0, 0, 40, 100), 0.6),  # 4: takes 1
    found(2, (0, 0, 30, 80), 0.5),  # 5: misplaced: 30 * 80 / (60 * 160) = 0.25 of 3
    found(9, (500, 0, 30, 70), 0.2),  # 6: background
    found(4, (0, 0, 30, 70), 0.99, category=3),  # 7: another category
]
# The curve: 0.9 TP, 0.8 FP, 0.6 TP, 0.5 FP, 0.3 TP, 0.2 FP. FPPI: 0, 0.1, 0.1, 0.2, 0.2, 0.3.


@pytest.fixture(scope="module")
def errors():
    return analyze_errors(truth(PEOPLE), DETECTIONS, EVERYONE, fppi=0.1)


def test_matches_by_hand():
    matches = match_setup(truth(PEOPLE), DETECTIONS, EVERYONE)
    assert matches.num_images == 10
    assert matches.detection.tolist() == [1, 2, 4, 5, 0, 6]
    assert matches.annotation.tolist() == [0, -1, 1, -1, 2, -1]
    assert matches.pedestrian.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(matches.fppi, [0, 0.1, 0.1, 0.2, 0.2, 0.3])


def test_without_the_category_nobody_counts():
    ground_truth = truth(PEOPLE) | {"categories": [{"id": 2}]}
    assert not len(match_setup(ground_truth, DETECTIONS, EVERYONE).pedestrian)


@rule("Errors are counted on the evaluator's own matching")
@pytest.mark.parametrize("setup", list(SETUPS))
def test_matches_give_the_evaluators_curve(setup):
    rng = np.random.default_rng(5)
    people, detections = [], []
    for image in rng.permutation(30) + 1:
        for _ in range(6):
            height = float(rng.uniform(15, 160))
            box = np.array([*rng.uniform(0, 150, 2), 0.4 * height, height])
            people.append(person(int(image), box, rng.uniform(0, 1), int(rng.random() < 0.2)))
            moved = (box + rng.normal(0, 0.1 * height, 4)).clip(1)
            detections.append(found(int(image), moved, float(rng.integers(1, 9)) / 8))
    detections = [detections[number] for number in rng.permutation(len(detections))]
    result = evaluate_miss_rate(truth(people, 30), detections, [setup])[setup]
    matches = match_setup(truth(people, 30), detections, SETUPS[setup])
    assert result.num_detections == len(matches.detection)
    assert result.fppi.tolist() == matches.fppi.tolist()
    assert result.scores.tolist() == [detections[row]["score"] for row in matches.detection]
    hits = np.cumsum(matches.annotation >= 0)
    assert result.miss.tolist() == (1 - hits / len(matches.pedestrian)).tolist()
    for detection, annotation in zip(matches.detection, matches.annotation, strict=True):
        if annotation >= 0:
            assert annotation in matches.pedestrian
            assert detections[detection]["image_id"] == people[annotation]["image_id"]


def test_operating_point(errors):
    # FPPI 0.1 is reached by the first false positive and not exceeded until the second.
    point = errors.operating_point
    assert (point.detections, point.score, point.found, point.pedestrians) == (3, 0.6, 2, 4)
    assert point.fppi == pytest.approx(0.1) and point.miss_rate == 0.5
    assert point.false_positives == {"duplicate": 1, "misplaced": 0, "background": 0}


def test_everything_is_missed_before_the_operating_point():
    # One false positive on ten images is over 0.05, and here it comes first.
    detections = [found(9, (500, 0, 30, 70), 0.99), *DETECTIONS]
    errors = analyze_errors(truth(PEOPLE), detections, EVERYONE, fppi=0.05)
    point = errors.operating_point
    assert (point.detections, point.score, point.found, point.fppi) == (0, None, 0, 0)
    assert [miss.annotation for miss in errors.worst_misses] == [3, 0, 1, 2]
    assert [miss.overlap for miss in errors.worst_misses] == [0, 0, 0, 0]


def test_detections_of_equal_score_behind_the_operating_point_do_not_count():
    # Both score 0.5; image 1 comes first, and the second would be the second false positive.
    detections = [found(2, (500, 0, 30, 70), 0.5), found(1, (500, 0, 30, 70), 0.5)]
    point = analyze_errors(truth(PEOPLE), detections, EVERYONE, fppi=0.1).operating_point
    assert point.detections == 1 and point.fppi == pytest.approx(0.1)


def test_by_height(errors):
    # Missed: 2 (50 pixels) and 3 (160); found: 0 and 1 (100 each, the lower edge of its range).
    ranges = {part.low: (part.pedestrians, part.missed) for part in errors.by_height}
    assert ranges == {
        0: (0, 0), 20: (0, 0), 35: (0, 0), 50: (1, 1), 75: (0, 0), 100: (2, 0), 150: (1, 1)
    }  # fmt: skip
    assert [part.high for part in errors.by_height] == list(HEIGHT_EDGES[1:])
    assert [part.miss_rate for part in errors.by_height] == [None, None, None, 1, None, 0, 1]


def test_by_visibility(errors):
    ranges = {part.low: (part.pedestrians, part.missed) for part in errors.by_visibility}
    assert ranges == {0: (0, 0), 0.2: (0, 0), 0.4: (1, 0), 0.65: (0, 0), 0.8: (1, 1), 0.9: (2, 1)}


def test_worst_false_positives(errors):
    listed = [(e.detection, e.image_id, e.score, e.kind) for e in errors.worst_false_positives]
    assert listed == [
        (2, 3, 0.8, "duplicate"), (5, 2, 0.5, "misplaced"), (6, 9, 0.2, "background")
    ]  # fmt: skip
    assert [entry.overlap for entry in errors.worst_false_positives] == [1, 0.25, 0]


def test_worst_misses(errors):
    # Height times visible share: 160 and 40. Detection 5 on the first scores under 0.6.
    listed = [(m.annotation, m.image_id, m.overlap, m.score) for m in errors.worst_misses]
    assert listed == [(3, 2, 0, None), (2, 1, 0, 0.3)]
    assert (errors.worst_misses[1].height, errors.worst_misses[1].visibility) == (50, 0.8)


def test_a_miss_says_how_near_a_detection_came():
    detections = [*DETECTIONS, found(2, (0, 0, 30, 80), 0.85)]
    errors = analyze_errors(truth(PEOPLE), detections, EVERYONE, fppi=0.2)
    assert errors.worst_misses[0].overlap == 0.25


def test_so_many_are_listed_and_all_are_counted():
    errors = analyze_errors(truth(PEOPLE), DETECTIONS, EVERYONE, fppi=0.2, worst=1)
    assert len(errors.worst_false_positives) == len(errors.worst_misses) == 1
    assert errors.operating_point.false_positives == {
        "duplicate": 1, "misplaced": 1, "background": 0
    }  # fmt: skip


def test_calibration_by_hand():
    # [0.9, 1]: scores 0.9 and 1, one of two right: |0.5 - 0.95|. [0.2, 0.3): 0.2 and 0.25, both
    # right: |1 - 0.225|. [0, 0.1): 0, wrong: 0. Five in all: (2 * 0.45 + 2 * 0.775 + 0) / 5 = 0.49
    scores, right = np.array([1, 0.9, 0.25, 0.2, 0]), np.array([1, 0, 1, 1, 0])
    calibration = calibrate(scores, right, min_score=0)
    counts = [part.detections for part in calibration.ranges]
    assert counts == [1, 0, 2, 0, 0, 0, 0, 0, 0, 2]
    assert calibration.ranges[9].precision == 0.5
    assert calibration.ranges[9].mean_score == pytest.approx(0.95)
    assert calibration.ranges[1].precision is None
    assert calibration.error == pytest.approx(0.49)
    # From 0.1 on, as it is shown: four are left, and any number below changes nothing.
    assert calibrate(scores, right).error == pytest.approx((2 * 0.45 + 2 * 0.775) / 4)
    more = calibrate(np.append(scores, [0.05] * 1000), np.append(right, [0] * 1000))
    assert more.error == calibrate(scores, right).error
    assert more.ranges[0].detections == 1001


def test_edges_of_scores_belong_to_the_upper_range():
    scores = np.arange(10) / 10  # 0.3 is 3 / 10, and 0.1 * 3 is not
    assert [part.detections for part in calibrate(scores, scores > 0).ranges] == [1] * 10
    assert math.isnan(calibrate(np.zeros(0), np.zeros(0)).error)


def test_calibration_of_the_counted_detections(errors):
    # Six count; the absorbed one at 0.95 and the other category do not.
    assert [part.detections for part in errors.calibration.ranges] == [0, 0, 1, 1, 0, 1, 1, 0, 1, 1]
    # |0 - 0.2| + |1 - 0.3| + |0 - 0.5| + |1 - 0.6| + |0 - 0.8| + |1 - 0.9| = 2.7, over six
    assert errors.calibration.error == pytest.approx(0.45)


def test_scores_that_are_no_probabilities():
    detections = [row | {"score": row["score"] * 10} for row in DETECTIONS]
    assert analyze_errors(truth(PEOPLE), detections, EVERYONE).calibration is None
    with pytest.raises(ValueError, match="outside 0 to 1"):
        calibrate(np.array([1.1]), np.array([1]))


def test_json_is_strict(errors):
    content = json.loads(json.dumps(errors.to_json(), allow_nan=False))
    assert content["by_height"][-1] == {
        "low": 150, "high": None, "pedestrians": 1, "missed": 1, "miss_rate": 1
    }  # fmt: skip
    assert content["operating_point"]["miss_rate"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setup": Setup((900, 1e10), (0, 1))}, "no pedestrian"),
        ({"detections": DETECTIONS[7:]}, "no detection of pedestrians"),
        ({"detections": [found(77, (0, 0, 9, 30), 0.5)]}, "image 77"),
        ({"fppi": 0}, "fppi is 0"),
        ({"worst": -1}, "worst is -1"),
    ],
)
def test_bad_input(change, message):
    good = {"ground_truth": truth(PEOPLE), "detections": DETECTIONS, "setup": EVERYONE}
    with pytest.raises(ValueError, match=message):
        analyze_errors(**good | change)
