"""Each switch of a protocol by a case by hand, and its rules against a twin in plain Python."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.plain_miss_rate import plain_protocol_miss_rate
from helpers.rules import rule
from helpers.same_bits import assert_same_bits
from hkd_d2.evaluation import (
    CITYPERSONS,
    PROTOCOLS,
    SETUPS,
    Protocol,
    Setup,
    evaluate_miss_rate,
    load_ground_truth,
    match_setup,
    select_protocol,
)

pytestmark = rule("A benchmark's rules are switches of a protocol, the same compiled and in NumPy")

MISS_RATE = [protocol for protocol in PROTOCOLS.values() if isinstance(protocol, Protocol)]
NEAR = {"near": Setup((50, 75))}


def person(image, box, vis=1.0, ignore=0, **more):
    row = {"image_id": image, "category_id": 1, "bbox": list(box), "ignore": ignore}
    return row | {"height": box[3], "vis_ratio": vis} | more


def truth(people, images=100):
    return {
        "images": [{"id": n, "width": 640, "height": 480} for n in range(1, images + 1)],
        "categories": [{"id": 1, "name": "pedestrian"}],
        "annotations": [row | {"id": number} for number, row in enumerate(people, 1)],
    }


def found(image, box, score):
    return {"image_id": image, "category_id": 1, "bbox": list(box), "score": score}


def evaluate(people, detections, setups=NEAR, images=100, protocol=CITYPERSONS, **switches):
    """The one result, the same from either matcher."""
    rules = replace(protocol, **switches)
    results = assert_same_bits(truth(people, images), detections, setups, protocol=rules)
    (result,) = results.values()
    return result


BOX = (100, 100, 25, 60)


# ------------------------------------------------------------------------------- every switch


def test_half_open_ranges_leave_out_their_upper_bound():
    people = [person(1, (100, 100, 25, 75))]
    assert evaluate(people, []).num_ground_truth == 1
    assert evaluate(people, [], half_open=("height",)).num_ground_truth == 0
    half = {"half": Setup((50, 75), (0, 0.5))}
    people = [person(1, BOX, vis=0.5)]
    assert evaluate(people, [], half, half_open=("visibility",)).num_ground_truth == 0
    assert evaluate(people, [], half, half_open=("height",)).num_ground_truth == 1


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((5, 5, 630, 60), 1),  # touches three sides of 5 to 635
        ((4.9, 100, 25, 60), 0),
        ((100, 4.9, 25, 60), 0),
        ((610.1, 100, 25, 60), 0),
        ((100, 415.1, 25, 60), 0),
        ((100, 415, 25, 60), 1),
    ],
)
def test_border(box, inside):
    border = (5, 5, 635, 475)
    assert evaluate([person(1, box)], [], border=border).num_ground_truth == inside
    assert evaluate([person(1, box)], []).num_ground_truth == 1


def test_the_border_counts_the_box_before_it_is_resized():
    # 8 wide at x 5; resized to 24.6 wide it would begin at -3.3.
    people = [person(1, (5, 100, 8, 60))]
    result = evaluate(people, [], border=(5, 5, 635, 475), aspect_ratio=0.41)
    assert result.num_ground_truth == 1


def test_countable_boxes_get_the_aspect_ratio():
    # 10 x 60 becomes 24.6 x 60 about x = 105: from 92.7. A detection there overlaps the box as it
    # is by 10 / 24.6 = 0.41, and resized by 1.
    people, detections = [person(1, (100, 100, 10, 60))], [found(1, (92.7, 100, 24.6, 60), 0.9)]
    assert evaluate(people, detections).miss.tolist() == [1]
    assert evaluate(people, detections, aspect_ratio=0.41).miss.tolist() == [0]
    # An ignored box stays: it absorbs the 24.6 wide one by 0.41 only.
    people = [person(1, (100, 100, 10, 60), ignore=1), person(2, BOX)]
    assert evaluate(people, detections, aspect_ratio=0.41).num_detections == 1
    # A detection of 8 at 101 lies in it, and is absorbed unless it is resized.
    thin = [found(1, (101, 100, 8, 60), 0.9)]
    assert evaluate(people, thin, aspect_ratio=0.41).num_detections == 0
    both = {"aspect_ratio": 0.41, "resize_detections": True}
    assert evaluate(people, thin, **both).num_detections == 1


def test_detections_get_the_aspect_ratio():
    people, thin = [person(1, (92.7, 100, 24.6, 60))], [found(1, (100, 100, 10, 60), 0.9)]
    assert evaluate(people, thin, aspect_ratio=0.41).miss.tolist() == [1]
    both = {"aspect_ratio": 0.41, "resize_detections": True}
    assert evaluate(people, thin, **both).miss.tolist() == [0]


def test_full_visibility_lies_over_ranges_that_end():
    partial = {"partial": Setup((50, 75), (0.65, 1))}
    people = [person(1, BOX, vis=1), person(2, BOX, vis=0.99)]
    assert evaluate(people, [], partial).num_ground_truth == 2
    assert evaluate(people, [], partial, full_visibility=1e10).num_ground_truth == 1
    unoccluded = {"full": Setup((50, 75), (1e10, 1e10))}
    assert evaluate(people, [], unoccluded, full_visibility=1e10).num_ground_truth == 1


def test_boxes_are_cut_at_the_edges():
    # 40 wide, 20 of it outside on the left: the cut detection is the cut box.
    people, detections = [person(1, (-20, 100, 40, 60))], [found(1, (0, 100, 20, 60), 0.9)]
    assert evaluate(people, detections).miss.tolist() == [0]  # 20 / 40
    people, detections = [person(1, (-21, 100, 40, 60))], [found(1, (0, 100, 19, 60), 0.9)]
    assert evaluate(people, detections).miss.tolist() == [1]  # 19 / 40
    assert evaluate(people, detections, clip_to_image=True).miss.tolist() == [0]
    # 60 high, 20 of it under the image's edge at 480: 40 are left, of box and detection.
    low = (100, 440, 25, 60)
    assert evaluate([person(1, low)], [], clip_to_image=True).num_ground_truth == 0
    result = evaluate([person(2, BOX)], [found(1, low, 0.9)], clip_to_image=True)
    assert result.num_detections == 1  # 40 is 50 / 1.25
    over = (100, 440.1, 25, 60)
    result = evaluate([person(2, BOX)], [found(1, over, 0.9)], clip_to_image=True)
    assert result.num_detections == 0
    wide = (700, 100, 25, 60)  # outside altogether: no width is left
    assert evaluate([person(2, BOX)], [found(1, wide, 0.9)], clip_to_image=True).fppi.tolist() == [
        0.01
    ]


def test_heights_of_detections():
    def counted(height, **switches):
        detections = [found(2, (0, 0, 10, height), 0.9)]
        return evaluate([person(1, BOX)], detections, **switches).num_detections

    assert [counted(40), counted(39.9), counted(93.75)] == [1, 0, 0]
    assert counted(40, lowest_is_dropped=True) == 0
    assert counted(40.001, lowest_is_dropped=True) == 1
    assert counted(5, height_slack=None) == counted(400, height_slack=None) == 1
    assert counted(49, height_slack=1) == 0


def test_all_detections_of_an_image_or_the_first():
    people = [person(1, BOX)]
    low = [found(1, (0, 0, 5, 10), 0.9)] * 1000
    detections = [found(1, BOX, 0.5), *low]
    assert evaluate(people, detections).num_detections == 0
    assert evaluate(people, detections, max_detections=None).miss.tolist() == [0]
    assert evaluate(people, detections, max_detections=1001).miss.tolist() == [0]


def test_ignored_persons_absorb_by_union_and_crowds_by_the_detections_area():
    big = (100, 100, 100, 120)
    inside = [found(1, (110, 110, 20, 60), 0.9)]  # 1200 / 12000 of the union
    for crowd, counted in ((1, 0), (0, 1)):
        people = [person(1, big, ignore=1, iscrowd=crowd), person(2, BOX)]
        assert evaluate(people, inside).num_detections == 0
        assert evaluate(people, inside, ignored_overlap="crowd").num_detections == counted
    same = [found(1, (100, 100, 100, 70), 0.9)]  # 7000 / 12000
    people = [person(1, big, ignore=1, iscrowd=0), person(2, BOX)]
    assert evaluate(people, same, ignored_overlap="crowd").num_detections == 0


def test_other_labels_are_left_out():
    people = [person(1, BOX, ignore=1, label="rider"), person(2, BOX), person(3, BOX, label="a")]
    detections = [found(1, BOX, 0.9), found(3, BOX, 0.8)]
    assert evaluate(people, detections).fppi.tolist() == [0]
    result = evaluate(people, detections, labels=("a",))
    assert (result.num_ground_truth, result.fppi.tolist()) == (2, [0.01, 0.01])
    matches = match_setup(truth(people), detections, NEAR["near"], replace(CITYPERSONS, labels="a"))
    assert matches.annotation.tolist() == [-1, 2] and matches.pedestrian.tolist() == [1, 2]


def test_pedestrians_of_images_without_detections():
    people = [person(1, BOX), person(2, BOX), person(3, BOX)]
    detections = [found(1, BOX, 0.9), found(3, (0, 0, 5, 60), 0.8)]
    assert evaluate(people, detections).miss.tolist() == pytest.approx([2 / 3, 2 / 3])
    result = evaluate(people, detections, skip_undetected=True)
    assert result.miss.tolist() == [0.5, 0.5]
    assert result.fppi.tolist() == [0, 0.01]  # over all 100 images


def test_a_match_with_the_annotation_of_id_zero():
    people, detections = [person(1, BOX), person(2, BOX)], [found(1, BOX, 0.9), found(2, BOX, 0.8)]
    for switch, first_id, hits in ((False, 0, 2), (True, 1, 2), (True, 0, 1)):
        rules = replace(CITYPERSONS, id_zero_is_unmatched=switch)
        ground_truth = truth(people)
        for number, row in enumerate(ground_truth["annotations"], first_id):
            row["id"] = number
        result = assert_same_bits(ground_truth, detections, protocol=rules)["Reasonable"]
        assert result.num_ground_truth == result.num_detections == 2
        assert (1 - result.miss[-1], result.fppi[-1]) == (hits / 2, (2 - hits) / 100)
        matches = match_setup(ground_truth, detections, SETUPS["Reasonable"], rules)
        assert np.count_nonzero(matches.annotation >= 0) == hits
        # The person is taken all the same, so that a second detection is no match either.
        twice = [*detections, found(1, BOX, 0.7)]
        result = assert_same_bits(ground_truth, twice, protocol=rules)["Reasonable"]
        assert (1 - result.miss[-1], result.fppi[-1]) == (hits / 2, (3 - hits) / 100)
    assert PROTOCOLS["kaist"].id_zero_is_unmatched and not CITYPERSONS.id_zero_is_unmatched


def test_heights_of_resized_images():
    small = [person(1, (100, 100, 10, height)) for height in (24, 25, 37, 38)]
    rules = CITYPERSONS.scaled(0.5)
    results = evaluate_miss_rate(truth(small), [found(1, BOX, 0.9)], protocol=rules)
    assert results["Reasonable"].num_ground_truth == 3
    assert results["small"].num_ground_truth == 2
    assert results["Reasonable"].setup.height == (25, 1e10)
    assert "height scale: 0.5" in "\n".join(rules.describe())
    assert rules.rules()["height_scale"] == 0.5
    assert PROTOCOLS["caltech"].scaled(2).border == (8, 8, 1268, 948)
    for scale in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="height scale is"):
            CITYPERSONS.scaled(scale)


def test_reference_points_exact_or_rounded():
    # One false positive on 1000 images for each of 57, then a hit: FPPI 0.057 is over 0.0562 and
    # over 10^-1.25 = 0.05623; with 17.8 per thousand the two differ: 178 of 10,000 images.
    people = [person(1, BOX)]
    detections = [found(2, BOX, 0.9)] * 178 + [found(1, BOX, 0.5)]
    exact = PROTOCOLS["caltech"].reference_fppi
    rounded = evaluate(people, detections, images=10_000)
    assert rounded.reference_miss.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]  # 0.0178 <= 0.0178
    result = evaluate(people, detections, images=10_000, reference_fppi=exact)
    assert result.reference_miss.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]  # 0.0178 > 0.01778...


def test_missing_points_by_the_protocol():
    people, detections = [person(1, BOX)], [found(2, BOX, 0.9), found(1, BOX, 0.5)]
    assert evaluate(people, detections, images=10).reference_miss.tolist() == [0] * 9
    result = evaluate(people, detections, images=10, missing_point="matlab")
    assert result.reference_miss.tolist() == [1] * 4 + [0] * 5


def test_the_smallest_miss_of_the_mean():
    people, detections = [person(1, BOX)], [found(1, BOX, 0.9)]
    assert evaluate(people, detections).miss_rate == 0
    assert evaluate(people, detections, miss_floor=1e-10).miss_rate == pytest.approx(1e-8)
    assert evaluate(people, detections, miss_floor=1e-10).reference_miss.tolist() == [0] * 9


# ------------------------------------------------------------------------------- the benchmarks


@pytest.mark.parametrize("protocol", MISS_RATE, ids=lambda p: p.name)
def test_rules_are_plain_json_and_words(protocol):
    rules = json.loads(json.dumps(protocol.rules(), allow_nan=False))
    assert rules["name"] == protocol.name and "setups" not in rules
    assert protocol.describe()[0] == f"protocol: {protocol.name} ({protocol.source})"
    assert not math.isinf(max(max(s.height) for s in protocol.setups.values()))


def counts(protocol, people):
    results = evaluate_miss_rate(truth(people), [], protocol=protocol)
    return {name: result.num_ground_truth for name, result in results.items()}


def test_caltech():
    heights = [person(1, (100, 100, 25, h)) for h in (20, 29, 30, 79, 80, 100)]
    got = counts("caltech", heights)
    assert (got["Scale=far"], got["Scale=medium"], got["Scale=near"]) == (2, 2, 2)  # 30, 80 are up
    vis = [person(1, BOX, vis=v) for v in (0.1, 0.2, 0.65, 0.9, 1)]
    assert counts("caltech", vis) == {
        "Reasonable": 3, "All": 4, "Scale=large": 0, "Scale=near": 0, "Scale=medium": 1,
        "Scale=far": 0, "Occ=none": 1, "Occ=partial": 2, "Occ=heavy": 2,
    }  # fmt: skip
    new = counts("caltech_new", vis)
    assert (new["Occ=partial"], new["Occ=none"], new["Reasonable"]) == (3, 1, 3)
    edge = [person(1, (4, 4, 630, 60)), person(1, (100, 414, 25, 60))]  # 5 to 635, 475 from 1
    assert counts("caltech_new", edge)["All"] == 2
    outside = [person(1, (3.9, 100, 25, 60))]
    assert counts("caltech_new", outside)["All"] == 0
    assert counts("caltech_new_no_border", outside)["All"] == 1


def test_eurocity():
    def people(**tags):
        return [person(1, BOX, **{"occlusion": 0, "truncation": 0} | tags)]

    def counted(**tags):
        return [name for name, number in counts("eurocity", people(**tags)).items() if number]

    assert counted() == ["reasonable", "small", "all"]
    assert counted(occlusion=10) == ["reasonable", "small", "all"]
    assert counted(occlusion=40) == ["occluded", "all"]
    assert counted(occlusion=80) == []
    assert counted(truncation=40) == ["all"]
    assert counted(occlusion=40, truncation=80) == []
    rider = people() + [person(2, BOX, ignore=1, occlusion=0, label="rider")]
    on_rider = [found(2, BOX, 0.9)]
    result = evaluate_miss_rate(truth(rider), on_rider, protocol="eurocity")["reasonable"]
    assert result.num_detections == 1
    result = evaluate_miss_rate(truth(rider), on_rider, protocol="eurocity_ignore_riders")
    assert result["reasonable"].num_detections == 0


def test_kaist():
    levels = [person(1, BOX, occlusion=level) for level in (0, 1, 1, 2)]
    detections = [found(1, (0, 0, 5, 5), 0.1)]
    results = evaluate_miss_rate(truth(levels), detections, protocol="kaist")
    got = {name: result.num_ground_truth for name, result in results.items()}
    assert got == {"Reasonable": 3, "Reasonable_small": 3, "Reasonable_occ=heavy": 1, "All": 4}
    assert results["Reasonable"].num_detections == 1  # no filter of heights
    assert counts("kaist", levels)["All"] == 0  # nothing detected in the image
    low = [person(1, (100, 100, 20, h), occlusion=0) for h in (54, 55)]
    results = evaluate_miss_rate(truth(low), detections, protocol="kaist")
    assert results["Reasonable"].num_ground_truth == 1


def test_files_have_what_the_protocol_reads(tmp_path):
    row = person(1, BOX, occlusion=0)
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(truth([row])))
    assert load_ground_truth(path, "kaist")["annotations"][0]["occlusion"] == 0
    for change, message in (
        ({"occlusion": None}, "occlusion None"),
        ({"occlusion": -1}, "occlusion -1"),
        ({"occlusion": 10**400}, "occlusion 10000"),
        ({"truncation": math.nan}, "truncation nan"),
    ):
        path.write_text(json.dumps(truth([row | change])))
        with pytest.raises(ValueError, match=r"gt.json: annotations\[0\] has " + message):
            load_ground_truth(path, "eurocity")
    del row["occlusion"]
    path.write_text(json.dumps(truth([row])))
    with pytest.raises(ValueError, match="no 'occlusion'"):
        load_ground_truth(path, "kaist")
    sizeless = truth([row | {"occlusion": 0}]) | {"images": [{"id": 1}]}
    with pytest.raises(ValueError, match=r"images\[0\] has no 'width'"):
        evaluate_miss_rate(sizeless, [], protocol="eurocity")


def test_what_is_refused():
    with pytest.raises(ValueError, match="protocol 'ecp' is unknown; choose from citypersons, "):
        select_protocol("ecp")
    with pytest.raises(ValueError, match="call evaluate_crowdhuman"):
        evaluate_miss_rate(truth([]), [], protocol="crowdhuman")
    with pytest.raises(ValueError, match="setup 'bare' is unknown; choose from Reasonable, All"):
        evaluate_miss_rate(truth([]), [], ["bare"], protocol="caltech")
    with pytest.raises(ValueError, match="range of occlusion, which protocol 'citypersons'"):
        evaluate_miss_rate(truth([]), [], {"x": Setup((0, 1), occlusion=(0, 1))})


# ----------------------------------------------------------------- compiled, reference and plain

BOXES = st.tuples(
    st.sampled_from([-8, 0, 4, 8, 12.5, 100, 630]),
    st.sampled_from([-4, 0, 4, 8, 470]),
    st.sampled_from([0, 4, 8, 12.5, 16]),
    st.sampled_from([0, 6, 8, 10, 16, 20, 24, 25, 50, 60.0]),
)
IMAGES = st.sampled_from([1, 3, 7])
PEOPLE = st.builds(
    person,
    IMAGES,
    BOXES,
    vis=st.sampled_from([0, 0.2, 0.65, 0.9, 1]),
    ignore=st.sampled_from([0, 0, 1]),
    iscrowd=st.sampled_from([0, 1]),
    occlusion=st.sampled_from([0, 1, 2, 40]),
    truncation=st.sampled_from([0, 40]),
    label=st.sampled_from(["pedestrian", "rider"]),
)
FOUND = st.builds(found, IMAGES, BOXES, st.sampled_from([0, 1, 0.5, -0.0, -1, 0.25]))
GRID = {
    "grid": Setup((8, 20), (0.2, 0.65), occlusion=(0, 2), truncation=(0, 40)),
    "any": Setup((0, 1e10)),
}
RULES = st.builds(
    Protocol,
    name=st.just("drawn"),
    source=st.just("nowhere"),
    setups=st.just(GRID),
    annotation_keys=st.just(("occlusion",)),
    max_detections=st.sampled_from([None, 3, 1000]),
    height_slack=st.sampled_from([None, 1.25]),
    lowest_is_dropped=st.booleans(),
    half_open=st.sampled_from([(), ("height",), ("occlusion", "truncation"), ("visibility",)]),
    full_visibility=st.sampled_from([1.0, 1e10]),
    border=st.sampled_from([None, (4, 4, 635, 475)]),
    clip_to_image=st.booleans(),
    aspect_ratio=st.sampled_from([None, 0.41, 0.5]),
    resize_detections=st.just(False),
    ignored_overlap=st.sampled_from(["detection", "crowd"]),
    labels=st.sampled_from([None, ("pedestrian",)]),
    skip_undetected=st.booleans(),
    id_zero_is_unmatched=st.booleans(),
    missing_point=st.sampled_from(["official", "matlab"]),
    miss_floor=st.sampled_from([0.0, 1e-10]),
)


@pytest.mark.long
@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    st.lists(PEOPLE, max_size=12),
    st.lists(FOUND, max_size=25),
    st.integers(1, 120),
    RULES,
    st.booleans(),
    st.booleans(),
)
def test_any_rules_give_the_same_bits_and_those_of_plain_python(
    people, detections, images, rules, resize, from_zero
):
    rules = replace(rules, resize_detections=resize and rules.aspect_ratio is not None)
    ground_truth = truth(people, max(images, 7))
    for row in ground_truth["annotations"]:
        row["id"] -= from_zero
    with np.errstate(all="ignore"):
        results = assert_same_bits(ground_truth, detections, protocol=rules)
    for name, setup in GRID.items():
        expected = plain_protocol_miss_rate(ground_truth, detections, setup, rules)
        if expected is None:
            assert results[name].miss_rate == -100
        else:
            assert results[name].reference_miss.tolist() == expected, name
