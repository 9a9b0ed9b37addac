"""Log-average miss rate against hand-computed cases, a brute-force twin and official scores."""

import copy
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.plain_miss_rate import plain_miss_rate
from helpers.published_data import CITYPERSONS, needs_citypersons
from helpers.same_bits import assert_same_bits
from hkd_d2.evaluation.miss_rate import (
    REFERENCE_FPPI,
    SETUPS,
    Setup,
    evaluate_miss_rate,
    format_table,
    load_detections,
    load_ground_truth,
    select_setups,
)


def person(image, box, vis=1.0, ignore=0, **more):
    return {
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "ignore": ignore,
        "bbox": list(box),
        "height": box[3],
        "vis_ratio": vis,
    } | more


def truth(people, images=100):
    """Ground truth of images 1 to ``images``."""
    return {
        "images": [{"id": number} for number in range(1, images + 1)],
        "categories": [{"id": 1, "name": "pedestrian"}],
        "annotations": [row | {"id": number} for number, row in enumerate(people, 1)],
    }


def found(image, box, score, category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def evaluate(people, detections, images=100, setup="Reasonable", **more):
    return evaluate_miss_rate(truth(people, images), detections, [setup], **more)[setup]


BOX = (100, 100, 25, 60)
ELSEWHERE = (900, 100, 25, 60)


# ----------------------------------------------------------------------------- by hand


def test_perfect_recall_is_zero():
    result = evaluate([person(1, BOX)], [found(1, BOX, 0.9)])
    assert result.miss_rate == 0.0
    assert (result.num_ground_truth, result.num_detections) == (1, 1)


@pytest.mark.parametrize("rule", ["official", "matlab"])
@pytest.mark.parametrize("detections", [[], [found(1, (0, 0, 5, 12), 0.9)]])
def test_nothing_counted_misses_everyone(detections, rule):
    # the second detection is lower than 40 pixels and dropped
    result = evaluate([person(1, BOX)], detections, missing_point=rule)
    assert result.miss_rate == 100.0
    assert result.num_detections == 0


def test_geometric_mean_over_the_reference_points():
    # 10 images, 4 people, TP FP TP: FPPI 0, 0.1, 0.1 and recall 0.25, 0.25, 0.5. The four values
    # under 0.1 read a miss of 0.75, the five from 0.1 on 0.5: (0.75^4 0.5^5)^(1/9) = 0.5987...
    people = [person(image, BOX) for image in (1, 2, 3, 4)]
    detections = [found(1, BOX, 0.9), found(9, BOX, 0.8), found(2, BOX, 0.7)]
    result = evaluate(people, detections, images=10)
    assert result.fppi.tolist() == [0, 0.1, 0.1]
    assert result.miss.tolist() == [0.75, 0.75, 0.5]
    assert result.scores.tolist() == [0.9, 0.8, 0.7]
    assert result.reference_miss.tolist() == [0.75] * 4 + [0.5] * 5
    assert result.miss_rate == pytest.approx(100 * (0.31640625 * 0.03125) ** (1 / 9), rel=1e-14)


def test_missing_reference_point_wraps_around_or_counts_as_recall_zero():
    # 10 images, 2 people, FP TP: the curve starts at FPPI 0.1, so 0.01 to 0.0562 are missing.
    people = [person(1, BOX), person(2, BOX)]
    detections = [found(3, BOX, 0.9), found(1, BOX, 0.8)]
    official = evaluate(people, detections, images=10)
    assert official.reference_miss.tolist() == [0.5] * 9
    assert official.miss_rate == pytest.approx(50, rel=1e-14)
    matlab = evaluate(people, detections, images=10, missing_point="matlab")
    assert matlab.reference_miss.tolist() == [1.0] * 4 + [0.5] * 5
    assert matlab.miss_rate == pytest.approx(100 * 2 ** (-5 / 9), rel=1e-14)  # 68.04


def test_rule_for_missing_points_cannot_matter_from_100_images_on(caplog):
    people = [person(1, BOX), person(2, BOX)]
    detections = [found(3, BOX, 0.9), found(1, BOX, 0.8)]
    rates = [
        evaluate(people, detections, missing_point=rule).miss_rate
        for rule in ("official", "matlab")
    ]
    assert rates[0] == rates[1] == pytest.approx(50, rel=1e-14)
    assert not caplog.records
    result = evaluate(people, detections, images=99)
    assert result.missing_points == 1
    assert "Reasonable lacks 1 of the 9 reference points" in caplog.text
    assert "99 images" in caplog.text and "'official'" in caplog.text
    caplog.clear()  # where the curve starts with a person, no point is missing
    assert evaluate(people, detections[1:], images=99).missing_points == 0
    assert not caplog.records


def test_every_image_of_the_ground_truth_divides_the_false_positives():
    people = [person(1, BOX)]
    detections = [found(5, BOX, 0.9), found(1, BOX, 0.8)]
    assert evaluate(people, detections, images=8).fppi.tolist() == [1 / 8, 1 / 8]


def test_overlap_of_exactly_one_half_matches():
    # 25 x 60 inside 25 x 120: 1500 / 3000
    people = [person(1, BOX)]
    assert evaluate(people, [found(1, (100, 100, 25, 120), 0.9)]).miss.tolist() == [0]
    assert evaluate(people, [found(1, (100, 100, 25, 120.001), 0.9)]).miss.tolist() == [1]


def test_of_equal_overlaps_the_later_box_is_taken():
    # Shifted by 10 from both, the first detection overlaps each by 30 * 60 / 3000 = 0.6. It takes
    # the later person, which leaves the earlier one to the second detection.
    people = [person(1, (0, 0, 40, 60)), person(1, (20, 0, 40, 60))]
    middle = found(1, (10, 0, 40, 60), 0.9)
    result = evaluate(people, [middle, found(1, (0, 0, 40, 60), 0.8)])
    assert result.miss.tolist() == [0.5, 0]
    result = evaluate(people, [middle, found(1, (20, 0, 40, 60), 0.8)])
    assert result.miss.tolist() == [0.5, 0.5]


def test_a_person_is_found_once_by_the_highest_score():
    people = [person(1, BOX)]
    worse = (100, 100, 25, 70)
    result = evaluate(people, [found(1, BOX, 0.8), found(1, worse, 0.9), found(1, BOX, 0.7)])
    assert result.miss.tolist() == [0, 0, 0]
    assert result.fppi.tolist() == [0, 0.01, 0.02]


def test_a_detection_falls_back_on_the_next_best_free_person():
    # IoU of the boxes of height 60 and 66 is 3600/3960; both detections prefer the first person.
    people = [person(1, (0, 0, 60, 60)), person(1, (0, 0, 60, 66))]
    detections = [found(1, (0, 0, 60, 60), 0.9), found(1, (0, 0, 60, 61), 0.8)]
    assert evaluate(people, detections).miss.tolist() == [0.5, 0]


def test_equal_scores_stand_by_image_then_file_order():
    people = [person(1, BOX), person(2, BOX)]
    # in the file: image 2 (TP), then in image 1 an FP before the TP
    detections = [found(2, BOX, 0.5), found(1, ELSEWHERE, 0.5), found(1, BOX, 0.5)]
    result = evaluate(people, detections)
    assert result.fppi.tolist() == [0.01, 0.01, 0.01]
    assert result.miss.tolist() == [1, 0.5, 0]


def test_ignored_boxes_absorb_any_number_by_the_detections_own_area():
    region = person(1, (0, 0, 500, 500), ignore=1)
    people = [region, person(2, BOX)]
    inside = [found(1, (x, 10, 20, 60), 0.9) for x in (10, 50, 480)]
    # the last lies inside by its left half exactly (10 of 20 pixels at x 490), then by less
    half, less = found(1, (490, 10, 20, 60), 0.9), found(1, (490.1, 10, 20, 60), 0.9)
    assert evaluate(people, [*inside, half, found(2, BOX, 0.5)]).fppi.tolist() == [0]
    assert evaluate(people, [*inside, less, found(2, BOX, 0.5)]).fppi.tolist() == [0.01, 0.01]


def test_a_countable_person_goes_before_an_ignored_box_of_larger_overlap():
    people = [person(1, BOX, ignore=1), person(1, (100, 100, 25, 100))]
    # IoU 0.6 with the person, 1 with the ignored box: a true positive; the second is absorbed
    result = evaluate(people, [found(1, BOX, 0.9), found(1, BOX, 0.8)])
    assert result.miss.tolist() == [0]


def test_people_out_of_range_are_ignored_and_the_bounds_belong_to_the_range():
    lowest = person(1, (0, 0, 20, 50), vis=0.65)
    assert evaluate([lowest], []).num_ground_truth == 1
    people = [
        lowest,
        person(2, (0, 0, 20, 49), vis=1.0),  # too low
        person(3, (0, 0, 20, 50), vis=0.649),  # too little visible
    ]
    result = evaluate(people, [found(image, (0, 0, 20, 50), 0.9) for image in (1, 2, 3)])
    assert (result.num_ground_truth, result.num_detections, result.miss_rate) == (1, 1, 0)
    small = [person(1, (0, 0, 20, height)) for height in (49.9, 50, 75, 75.1)]
    assert evaluate(small, [], setup="Reasonable_small").num_ground_truth == 2
    vis = [person(1, (0, 0, 20, 60), vis=share) for share in (0, 0.19, 0.2, 0.65, 0.66, 0.9)]
    counts = {"Reasonable_occ=heavy": 2, "heavy": 4, "partial": 3, "bare": 1, "Reasonable": 3}
    results = evaluate_miss_rate(truth(vis), [])
    assert {name: results[name].num_ground_truth for name in counts} == counts


@pytest.mark.parametrize(
    ("setup", "height", "counted"),
    [
        ("Reasonable", 40, 1),  # 50 / 1.25 is kept
        ("Reasonable", 39.999, 0),
        ("Reasonable_small", 93.749, 1),
        ("Reasonable_small", 93.75, 0),  # 75 * 1.25 is dropped
        ("All", 16, 1),
        ("All", 15.999, 0),
    ],
)
def test_detections_are_kept_with_slack_in_height(setup, height, counted):
    result = evaluate([person(1, BOX)], [found(2, (0, 0, 10, height), 0.9)], setup=setup)
    assert result.num_detections == counted


def test_the_cap_of_1000_detections_acts_before_the_height_filter():
    people = [person(1, BOX)]
    low = [found(1, (0, 0, 5, 10), 0.9)] * 1000
    assert evaluate(people, [found(1, BOX, 0.5), *low]).num_detections == 0
    assert evaluate(people, [found(1, BOX, 0.5), *low[:999]]).miss_rate == 0
    # per image: other images do not fill it
    assert (
        evaluate(people, [found(1, BOX, 0.5), *(d | {"image_id": 2} for d in low)]).miss_rate == 0
    )


def test_without_a_countable_box_the_result_is_minus_100():
    result = evaluate([person(1, BOX, ignore=1)], [found(2, BOX, 0.9)])
    assert result.miss_rate == -100.0
    assert np.isnan(result.reference_miss).all()
    without_category = truth([person(1, BOX)]) | {"categories": [{"id": 2, "name": "rider"}]}
    result = evaluate_miss_rate(without_category, [found(1, BOX, 0.9)])["Reasonable"]
    assert (result.miss_rate, result.num_ground_truth) == (-100.0, 0)


@pytest.mark.parametrize(
    ("people", "detections", "message"),
    [
        (
            [],
            [found(1, BOX, 0.9)],
            "counts in Reasonable: the ground truth has no box",
        ),
        ([person(1, BOX, ignore=1)], [found(1, BOX, 0.9)], "Reasonable: all 1 boxes .* ignored"),
        (
            [person(1, (0, 0, 20, 30)), person(1, BOX, ignore=1)],
            [found(1, BOX, 0.9)],
            "Reasonable: the 1 boxes that the file does not ignore lie .*heights 30 to 30",
        ),
        ([person(1, BOX)], [], "no detection of pedestrians"),
        ([person(1, BOX)], [found(2, BOX, 0.9)], "No detection lies in an image with pedestrians"),
    ],
)
def test_it_is_said_why_nothing_counts(caplog, people, detections, message):
    evaluate(people, detections)
    assert re.search(message, caplog.text), caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("number", [0, 3])
def test_the_pedestrians_category_may_have_any_id(number):
    rows = [person(1, BOX, category_id=number), person(2, BOX, category_id=7)]
    ground_truth = truth(rows) | {
        "categories": [{"id": number, "name": "person"}, {"id": 7, "name": "rider"}]
    }
    for category in {number, 1}:  # this package's own files have 1
        detections = [found(1, BOX, 0.9, category=category)]
        result = assert_same_bits(ground_truth, detections)["Reasonable"]
        assert (result.miss_rate, result.num_ground_truth) == (0, 1)
    ground_truth["categories"][0]["name"] = "walker"
    with pytest.raises(ValueError, match=f"{number} 'walker', 7 'rider'"):
        evaluate_miss_rate(ground_truth, [])


def test_crowds_are_ignored_whether_or_not_the_row_says_ignore():
    crowd = person(1, (200, 0, 200, 150), iscrowd=1)
    for row in (crowd, {key: value for key, value in crowd.items() if key != "ignore"}):
        result = assert_same_bits(truth([person(1, BOX), row]), [found(1, BOX, 0.9)])
        assert (result["All"].miss_rate, result["All"].num_ground_truth) == (0, 1)


def test_height_and_visibility_have_the_defaults_of_training(tmp_path, caplog):
    plain, hidden = person(1, BOX), person(2, BOX, vis_bbox=[*BOX[:3], BOX[3] / 2])
    for row in (plain, hidden):
        del row["height"], row["vis_ratio"]
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(truth([plain, hidden])))
    ground_truth = load_ground_truth(path)
    assert caplog.text.count("of 2 pedestrians 2 have no height") == 1
    assert "1 have no visible share: they count as wholly visible" in caplog.text
    results = assert_same_bits(ground_truth, [found(1, BOX, 0.9)])
    counts = {name: results[name].num_ground_truth for name in ("Reasonable", "heavy", "All")}
    assert counts == {"Reasonable": 1, "heavy": 1, "All": 2}


def test_files_with_a_byte_order_mark_are_read(tmp_path):
    for name, content in (("gt", truth([person(1, BOX)])), ("found", [found(1, BOX, 0.9)])):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8-sig")
    ground_truth = load_ground_truth(tmp_path / "gt")
    assert load_detections(tmp_path / "found", ground_truth) == [found(1, BOX, 0.9)]


def test_annotation_ids_from_zero_do_no_harm():
    ground_truth = truth([person(1, BOX), person(2, BOX)])
    for annotation in ground_truth["annotations"]:
        annotation["id"] -= 1
    result = evaluate_miss_rate(ground_truth, [found(1, BOX, 0.9), found(2, BOX, 0.8)])
    assert result["Reasonable"].miss_rate == 0


def test_other_categories_are_dropped_and_counted(caplog):
    people = [person(1, BOX), person(2, BOX, category_id=2)]
    result = evaluate(people, [found(1, BOX, 0.9), found(3, BOX, 0.95, category=2)])
    assert (result.miss_rate, result.num_ground_truth, result.num_detections) == (0, 1, 1)
    assert "1 of 2 detections have a category_id other than 1" in caplog.text


def test_arguments_stay_as_they_are():
    ground_truth = truth([person(1, (0, 0, 20, 30)), person(2, BOX)])
    detections = [found(2, BOX, 0.5), found(1, BOX, 0.9)]
    before = copy.deepcopy((ground_truth, detections))
    first = evaluate_miss_rate(ground_truth, detections)
    again = evaluate_miss_rate(ground_truth, detections)
    assert (ground_truth, detections) == before
    assert {n: r.miss_rate for n, r in first.items()} == {n: r.miss_rate for n, r in again.items()}


def test_setups_by_name_or_of_ones_own():
    assert list(evaluate_miss_rate(truth([]), [], ["large", "bare"])) == ["large", "bare"]
    own = {"near": Setup((60, 70), (0, 1))}
    assert evaluate_miss_rate(truth([person(1, BOX)]), [], own)["near"].num_ground_truth == 1
    with pytest.raises(ValueError, match="'Resonable' is unknown; choose from Reasonable, "):
        select_setups(["Resonable"])
    with pytest.raises(ValueError, match="missing_point is 'python'"):
        evaluate_miss_rate(truth([]), [], missing_point="python")


def test_table_says_ranges_counts_and_percent():
    lines = format_table(evaluate_miss_rate(truth([person(1, BOX)]), [])).splitlines()
    assert lines[1].split() == ["Reasonable", ">=", "50", ">=", "0.65", "1", "100.00"]
    assert lines[3].split()[:6] == ["Reasonable_occ=heavy", ">=", "50", "0.2", "to", "0.65"]
    assert len(lines) == 1 + len(SETUPS)


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: [], "holds a list"),
        (lambda g: g | {"images": []}, "lists no images"),
        (lambda g: {"images": g["images"], "annotations": []}, "no list 'categories'"),
        (lambda g: g | {"images": [{"id": 1}, {"id": 1}]}, "image id twice"),
        (lambda g: g | {"images": [{"id": "a"}]}, r"images\[0\] has id 'a'"),
        (lambda g: g | {"images": [{}]}, r"images\[0\] has no 'id'"),
        (lambda g: g | {"annotations": [7]}, r"annotations\[0\] is 7"),
        (lambda g: g | {"annotations": g["annotations"] * 2}, r"annotations\[1\] has id 1.*twice"),
    ],
)
def test_malformed_ground_truth(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_miss_rate(change(truth([person(1, BOX)])), [])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_id", 101, "lies in image 101"),
        ("bbox", [1, 2, 3], "make it four numbers"),
        ("bbox", [1, 2, math.nan, 4], "finite"),
        ("bbox", [1, 2, -3, 4], "negative width"),
        ("category_id", "1", "category_id '1'"),
        ("height", -1, "height -1"),
        ("height", 10**400, "height 10000"),
        ("vis_ratio", math.inf, "vis_ratio inf"),
        ("ignore", 2, "ignore 2"),
    ],
)
def test_malformed_annotation_is_named(key, value, message):
    people = [person(1, BOX), person(1, BOX) | {key: value}]
    with pytest.raises(ValueError, match=r"annotations\[1\].*" + message):
        evaluate_miss_rate(truth(people), [])
    if key not in ("ignore", "height", "vis_ratio"):
        del people[1][key]
        with pytest.raises(ValueError, match=rf"annotations\[1\] has no '{key}'"):
            evaluate_miss_rate(truth(people), [])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_id", 101, "lies in image 101"),
        ("image_id", "1", "lies in image '1'"),
        ("bbox", "1234", "make it four numbers"),
        ("bbox", [0, 0, 1, math.inf], "finite"),
        ("bbox", [0, 0, 1, -1], "negative width or height"),
        ("score", math.nan, "score nan"),
        ("score", "0.5", "score '0.5'"),
        ("category_id", None, "category_id None"),
    ],
)
def test_malformed_detection_is_named(key, value, message):
    detections = [found(1, BOX, 0.9), found(1, BOX, 0.9) | {key: value}]
    with pytest.raises(ValueError, match="detection 1 .*" + message):
        evaluate_miss_rate(truth([]), detections)
    del detections[1][key]
    with pytest.raises(ValueError, match=f"detection 1 has no '{key}'"):
        evaluate_miss_rate(truth([]), detections)


def test_files_are_read_and_errors_name_them(tmp_path):
    ground_truth = truth([person(1, BOX)])
    (tmp_path / "gt.json").write_text(json.dumps(ground_truth))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "broken.json").write_text('[{"image_id": 1,')
    (tmp_path / "nan.json").write_text(json.dumps([found(1, BOX, math.nan)]))
    assert load_ground_truth(tmp_path / "gt.json") == ground_truth
    assert load_detections(tmp_path / "empty.json", ground_truth) == []
    with pytest.raises(ValueError, match="broken.json is not valid JSON"):
        load_detections(tmp_path / "broken.json", ground_truth)
    with pytest.raises(ValueError, match="nan.json: detection 0 has score nan"):
        load_detections(tmp_path / "nan.json", ground_truth)
    with pytest.raises(ValueError, match="gt.json holds a dict"):
        load_detections(tmp_path / "gt.json", ground_truth)
    with pytest.raises(ValueError, match="empty.json holds a list"):
        load_ground_truth(tmp_path / "empty.json")
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        load_ground_truth(tmp_path / "nowhere.json")


# ----------------------------------------------------------------------------- brute force


# Coarse grids make equal scores, equal overlaps and overlaps of exactly one half common.
BOXES = st.tuples(
    st.sampled_from([0, 4, 8, 12, 100]),
    st.sampled_from([0, 4, 8]),
    st.sampled_from([0, 4, 8, 12.5, 16]),
    st.sampled_from([0, 6, 8, 10, 16, 20, 24, 25, 32]),
)
IMAGES = st.sampled_from([3, 7, 11])
PEOPLE = st.builds(
    person,
    IMAGES,
    BOXES,
    vis=st.sampled_from([0.1, 0.5, 0.65, 1.0]),
    ignore=st.sampled_from([0, 0, 0, 1]),
    category_id=st.sampled_from([1, 1, 1, 2]),
)
FOUND = st.builds(
    found,
    IMAGES,
    BOXES,
    st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]),
    category=st.sampled_from([1, 1, 1, 1, 2]),
)
GRID_SETUP = Setup((8, 20), (0.5, 0.65))
ANY_SETUP = Setup((1, 1e10), (0.0, 1e10))


@pytest.mark.long
@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.lists(PEOPLE, max_size=12),
    st.lists(FOUND, max_size=25),
    st.integers(0, 150),
    st.sampled_from(["official", "matlab"]),
)
def test_equal_to_brute_force(people, detections, empty_images, missing_point):
    ground_truth = truth(people)
    # ids out of order, and images without a box
    ground_truth["images"] = [{"id": i} for i in (11, 3, 7, *range(20, 20 + empty_images))]
    setups = {"grid": GRID_SETUP, "any": ANY_SETUP}
    results = evaluate_miss_rate(ground_truth, detections, setups, missing_point)
    for name, setup in setups.items():
        expected = plain_miss_rate(ground_truth, detections, setup, missing_point)
        result = results[name]
        if expected is None:
            assert result.miss_rate == -100.0
            continue
        assert result.reference_miss.tolist() == expected  # to the bit
        logs = [math.log(miss) if miss else -math.inf for miss in expected]
        percent = 100 * math.exp(sum(logs) / 9)
        assert result.miss_rate == pytest.approx(percent, rel=1e-13)


def test_brute_force_on_a_crowded_scene():
    # 120 images of jittered boxes: enough false positives to pass every reference value
    random = np.random.default_rng(7)
    people, detections = [], []
    for image in range(1, 121):
        for _ in range(random.integers(0, 7)):
            height = float(random.integers(20, 200))
            x, y = random.integers(0, 400, 2).tolist()
            box = (x, y, 0.41 * height, height)
            vis = float(random.uniform(0, 1))
            people.append(person(image, box, vis=vis, ignore=int(random.random() < 0.1)))
            for _ in range(random.integers(0, 4)):
                jitter = box * random.normal(1, 0.08, 4)
                detections.append(found(image, jitter.tolist(), round(random.random(), 2)))
        for _ in range(random.integers(0, 4)):
            box = [*random.integers(0, 800, 2).tolist(), 30.0, 70.0]
            detections.append(found(image, box, round(random.random(), 2)))
    order = random.permutation(len(detections))
    detections = [detections[i] for i in order]
    ground_truth = truth(people, 120)
    results = evaluate_miss_rate(ground_truth, detections)
    for name, result in results.items():
        expected = plain_miss_rate(ground_truth, detections, SETUPS[name], "official")
        assert result.reference_miss.tolist() == expected
        assert 0 < result.miss_rate < 100
    assert results["All"].fppi[-1] > REFERENCE_FPPI[-1]


# ----------------------------------------------------------------------------- official scores

# Output of the published evaluation script on these files; its last digit hangs on how the NumPy
# at hand rounds logarithms, so the comparison leaves it out.
SIBLING_HEAD = "ligang-cs_CSP_DLA34_SiblingHead_temp_val.json"
DCN = "ligang-cs_CSP_DLA-34_w_DCN_temp_val.json"
SUBSET = "s10_sub20_topFP.json"
OWN_SETUPS = ("Reasonable", "Reasonable_small", "Reasonable_occ=heavy", "All")
OFFICIAL = {
    DCN: (16.78887927612315, 21.88900194655294, 50.784239410107055, 43.86557500735075),
    SIBLING_HEAD: (11.346899607698207, 15.284207095216438, 41.30002841325083, 37.835122482602),
    "s1_jitter_unsorted.json": (
        30.258444489111174,
        43.28444637693888,
        56.19408337423617,
        49.905653638843916,
    ),
    "s2_ties_quant0.1.json": (
        40.051574448933465,
        53.133758954949414,
        68.5011349471329,
        59.21387273743278,
    ),
    "s5_boundaries.json": (
        76.74062404125395,
        70.24132422888675,
        57.66946114411283,
        89.86939823489195,
    ),
    "s7_ignore_stress.json": (
        35.1312386483553,
        44.5599446485066,
        51.36721970360644,
        50.77783474224914,
    ),
    SUBSET: (25.355120485132048, 33.018654458732385, 60.0, 38.52999530718105),
}
OTHER_SETUPS = ("bare", "partial", "heavy", "middle", "large")
OFFICIAL_OTHER = {
    SIBLING_HEAD: (7.8506, 9.9776, 49.6562, 4.5133, 6.9091),
    DCN: (11.5277, 16.2058, 60.3318, 5.3118, 9.2744),
}
MATLAB_SUBSET = (41.8603816, 33.0186545, 71.1378661, 55.9653976)


def load(name):
    ground_truth = load_ground_truth(
        CITYPERSONS / ("sub20_gt.json" if name == SUBSET else "val_gt.json")
    )
    return ground_truth, load_detections(CITYPERSONS / name, ground_truth)


@needs_citypersons
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_scores(name):
    results = evaluate_miss_rate(*load(name))
    rates = [results[setup].miss_rate for setup in OWN_SETUPS]
    assert rates == pytest.approx(OFFICIAL[name], rel=2e-15)
    assert results["small"].miss_rate == results["Reasonable_small"].miss_rate
    other = [results[setup].miss_rate for setup in OTHER_SETUPS]
    if name in OFFICIAL_OTHER:
        assert [round(rate, 4) for rate in other] == list(OFFICIAL_OTHER[name])


@needs_citypersons
def test_matlab_scores_of_a_subset():
    results = evaluate_miss_rate(*load(SUBSET), missing_point="matlab")
    rates = [round(results[setup].miss_rate, 7) for setup in OWN_SETUPS]
    assert rates == list(MATLAB_SUBSET)


@needs_citypersons
def test_countable_boxes_of_the_validation_set():
    results = evaluate_miss_rate(load_ground_truth(CITYPERSONS / "val_gt.json"), [])
    assert [result.num_ground_truth for result in results.values()] == [
        *(1579, 351, 735, 2875),
        *(769, 814, 972),
        *(351, 311, 941),
    ]
