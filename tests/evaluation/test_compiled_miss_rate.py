"""The compiled miss rate against its definition, to the last bit of every curve."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hkd_d2
from helpers.command import run_code
from helpers.published_data import CITYPERSONS, needs_citypersons
from helpers.rules import rule
from helpers.same_bits import assert_same_bits
from hkd_d2.evaluation import (
    SETUPS,
    Setup,
    coco_rows,
    evaluate_miss_rate,
    load_detections,
    load_ground_truth,
    matching,
)
from hkd_d2.evaluation.compiled import COMPILED

pytestmark = rule(
    "The compiled miss rate equals the reference to the last bit and refuses rows in the same words"
)

ROOT = Path(__file__).resolve().parents[2]


def truth(people, images=(0, 1, 2)):
    return {
        "images": [{"id": number} for number in images],
        "categories": [{"id": 1}],
        "annotations": people,
    }


def person(number, image, box, vis=1.0, category=1, **more):
    box = list(box)
    row = {"id": number, "image_id": image, "category_id": category, "bbox": box}
    return row | {"height": box[3], "vis_ratio": vis} | more


def found(image, box, score, category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def test_it_is_compiled():
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    built = [*Path(hkd_d2.__file__).parent.glob("_native.*")]
    if built and not any(path.name.endswith(suffix) for path in built for suffix in suffixes):
        pytest.skip("hkd_d2._native is built for another Python")
    assert COMPILED


# ----------------------------------------------------------------------------- equal to the bit

# Coarse grids make equal scores, equal overlaps, duplicates and overlaps of exactly one half.
BOXES = st.tuples(
    st.sampled_from([0, 4, 8, 12.5, 100]),
    st.sampled_from([0, 4, 8]),
    st.sampled_from([0, 4, 8, 12.5, 16]),
    st.sampled_from([0, 6, 8, 10, 16, 20, 24, 25, 50, 60.0]),
)
IMAGES = st.sampled_from([0, 3, 7])
PEOPLE = st.builds(
    lambda image, box, vis, category, more: person(0, image, box, vis, category, **more),
    IMAGES,
    BOXES,
    st.sampled_from([0, 0.1, 0.2, 0.65, 0.9, 1]),
    st.sampled_from([1, 1, 1, 2]),
    st.sampled_from([{}, {"ignore": 0}, {"ignore": 1, "iscrowd": 1}]),
)
FOUND = st.builds(
    found,
    IMAGES,
    BOXES,
    st.sampled_from([0, 1, 0.5, -0.0, -1, 0.25]),
    st.sampled_from([1, 1, 1, 2]),
)
GRID = {"grid": Setup((8, 20), (0.2, 0.65)), "any": Setup((0, 1e10), (0, 1e10))}


@pytest.mark.long
@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    st.lists(PEOPLE, max_size=14),
    st.lists(FOUND, max_size=30),
    st.integers(0, 120),
    st.booleans(),
    st.sampled_from(["official", "matlab"]),
)
def test_on_coarse_grids(people, detections, empty_images, has_category, missing_point):
    people = [row | {"id": number} for number, row in enumerate(people)]
    ground_truth = truth(people, images=[7, 0, 3, *range(20, 20 + empty_images)])
    if not has_category:
        ground_truth["categories"] = [{"id": 2}]
    assert_same_bits(ground_truth, detections, {**SETUPS, **GRID}, missing_point=missing_point)


ANY = st.floats(allow_nan=False, allow_infinity=False)
SIDE = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
NEAR = st.tuples(*[st.floats(0, 3, width=16)] * 2, *[st.floats(1, 3, width=16)] * 2)
WILD = st.one_of(NEAR, NEAR, st.tuples(ANY, ANY, SIDE, SIDE))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.lists(st.tuples(IMAGES, WILD, st.floats(0, 2)), max_size=8),
    st.lists(st.tuples(IMAGES, WILD, ANY), max_size=20),
)
def test_on_any_finite_numbers(people, detections):
    """Sums and products that overflow, areas too small for a double, scores of either sign."""
    people = [person(number, *row) for number, row in enumerate(people)]
    ground_truth = truth(people, images=[0, 3, 7])
    setups = {"any": Setup((0, 1e300), (0, 3)), "some": Setup((1.5, 2.5), (0.5, 1))}
    assert_same_bits(ground_truth, [found(*row) for row in detections], setups)


def test_the_cap_of_an_image_comes_before_the_heights():
    # 1,000 low boxes and, at the very same score, 20 matches; image 1 has fewer.
    low, match = (0, 0, 8, 16), (100, 100, 25, 60)
    people = [person(1, 0, match), person(2, 1, match)]
    detections = [found(0, low, 0.5)] * 999 + [found(0, match, 0.5)] * 20
    results = assert_same_bits(truth(people), detections + [found(1, match, 0.5)] * 20)
    # In image 0 one detection is left, a match; in image 1 one match and 19 false positives.
    assert results["Reasonable"].num_detections == 21
    assert results["Reasonable"].miss[-1] == 0
    assert results["Reasonable"].fppi[-1] == 19 / 3


def test_of_equal_overlaps_the_later_box_is_taken():
    # The first detection lies half-way between two boxes, IoU 20/28; the second is on the first
    # box's far side, IoU 20/28 with it alone, and finds it free only if the later one was taken.
    people = [person(1, 0, (8, 0, 24, 60)), person(2, 0, (0, 0, 24, 60))]
    detections = [found(0, (4, 0, 24, 60), 0.9), found(0, (12, 0, 24, 60), 0.8)]
    results = assert_same_bits(truth(people), detections)
    assert results["All"].miss.tolist() == [0.5, 0]
    people[0]["bbox"], people[1]["bbox"] = people[1]["bbox"], people[0]["bbox"]
    assert assert_same_bits(truth(people), detections)["All"].miss.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    # Half of the detection; these round to another side of 0.5 if the union is summed otherwise.
    [(23.4, 79.1, (23.4, 39.55)), (39.5, 53.2, (19.75, 53.2)), (32.6, 88.9, (16.3, 88.9))],
)
def test_the_union_is_summed_in_the_same_order(width, height, size):
    people = [person(1, 0, (0.1, 0.1, *size))]
    assert_same_bits(truth(people), [found(0, (0.1, 0.1, width, height), 0.9)])


def test_more_setups_than_one_pass_takes():
    random = np.random.default_rng(3)
    boxes = random.uniform((0, 0, 20, 20), (60, 60, 60, 90), (200, 4))
    people = [person(n, n % 3, box.tolist(), n / 60) for n, box in enumerate(boxes[:60])]
    detections = [found(n % 3, box.tolist(), (n % 9) / 9) for n, box in enumerate(boxes)]
    bounds = [(low, low + 20 + step) for low in range(10, 60, 10) for step in range(30)]
    results = assert_same_bits(
        truth(people), detections, {str(b): Setup(b, (0.1, 0.8)) for b in bounds}
    )
    assert len(results) == 150 > 2 * matching.COMPILED_SETUPS
    assert len({result.miss_rate for result in results.values()}) > 5


FILES = [
    "ligang-cs_CSP_DLA-34_w_DCN_temp_val.json",
    "ligang-cs_CSP_DLA34_SiblingHead_temp_val.json",
    "s1_jitter_unsorted.json",
    "s2_ties_quant0.1.json",
    "s5_boundaries.json",
    "s7_ignore_stress.json",
    "s10_sub20_topFP.json",
]


@needs_citypersons
@pytest.mark.parametrize("name", FILES)
def test_on_published_files(name):
    subset = "sub20_gt.json" if "sub20" in name else "val_gt.json"
    ground_truth = load_ground_truth(CITYPERSONS / subset)
    detections = load_detections(CITYPERSONS / name, ground_truth)
    assert_same_bits(ground_truth, detections)
    assert_same_bits(ground_truth, detections, missing_point="matlab")


# ----------------------------------------------------------------------------- rows


class Box(list):
    pass


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": np.int64(1)},
        {"image_id": 1.0},
        {"image_id": True},
        {"category_id": 1.0},
        {"category_id": np.int32(1)},
        {"category_id": 2.5},
        {"bbox": (100, 100, 25, 60)},
        {"bbox": np.array([100.0, 100, 25, 60])},
        {"bbox": Box([100, 100, 25, 60])},
        {"bbox": [np.float64(100), np.float32(100), 25, 60]},
        {"score": np.float32(0.3)},
        {"score": 2**70},
        {"height": np.float64(60)},
        {"vis_ratio": 1},
        {"ignore": True},
        {"ignore": 0.0},
        {"ignore": 1},
        {"id": np.int64(8)},
        {"id": 2**70},
    ],
)
def test_rows_that_json_does_not_make_are_read_alike(change):
    box = (100, 100, 25, 60)
    people = [person(5, 0, box), person(9, 1, box) | change]
    detections = [found(1, box, 0.25), found(1, box, 0.5) | change, found(0, box, 0.5)]
    assert_same_bits(truth(people), detections)
    if "id" not in change:
        for row in people:
            del row["id"]
        assert_same_bits(truth(people), detections)


MISSING = object()
BAD_VALUES = [
    ("people", "id", 5),  # used twice
    ("people", "id", "4"),
    ("people", "height", -1),
    ("people", "vis_ratio", float("nan")),
    ("people", "iscrowd", 2),
    ("people", "ignore", 2),
    *(
        (rows, *bad)
        for rows in ("people", "found")
        for bad in (
            ("image_id", 4),
            ("image_id", "1"),
            ("image_id", MISSING),
            ("category_id", MISSING),
            ("bbox", [1, 2, 3]),
            ("bbox", [1, 2, -3, 4]),
            ("bbox", [1, 2, "3", 4]),
            ("bbox", MISSING),
        )
    ),
    ("found", "score", float("inf")),
    ("found", "score", True),
    ("found", "score", MISSING),
]


@pytest.mark.parametrize(("rows", "key", "value"), BAD_VALUES)
@pytest.mark.parametrize("category", [1, 2])
def test_bad_rows_are_refused_in_the_same_words(rows, key, value, category):
    box = (100, 100, 25, 60)
    given = {
        "people": [person(number, 1, box) for number in (5, 6)],
        "found": [found(0, box, 0.5), found(1, box, 0.25)],
    }
    bad = given[rows][1]
    bad["category_id"] = category
    bad[key] = value
    if value is MISSING:
        del bad[key]
    said = []
    for impl in ("compiled", "reference"):
        try:
            evaluate_miss_rate(truth(given["people"]), given["found"], impl=impl)
        except ValueError as error:
            said.append(str(error))
    # Of annotations of another category only the image and the id matter.
    free = rows == "people" and category == 2 and key not in ("id", "image_id", "category_id")
    assert len(said) == (0 if free else 2) and len(set(said)) <= 1


@pytest.mark.parametrize("rows", ["people", "found"])
def test_a_row_that_is_no_object_is_refused_in_the_same_words(rows):
    given = {"people": [], "found": []} | {rows: [[1, 2]]}
    for impl in ("compiled", "reference"):
        with pytest.raises(ValueError, match=r"is \[1, 2\]; make it an object with"):
            evaluate_miss_rate(truth(given["people"]), given["found"], impl=impl)


def test_arrays_that_do_not_fit_are_refused():
    """Nothing is read or written out of bounds, whoever calls."""
    columns = {
        "truth_image": np.zeros(2, np.int64),
        "truth_box": np.ones((2, 4)),
        "truth_counted_box": np.ones((2, 4)),
        "truth_region": np.ones(2, bool),
        "truth_countable": np.ones(2, np.uint64),
        "image": np.zeros(3, np.int64),
        "box": np.ones((3, 4)),
        "score": np.ones(3),
        "heights": np.array([[0, 9.0]]),
        "images": 1,
        "max_detections": 10,
        "min_overlap": 0.5,
    }
    (curve,) = matching.trace_setups(**columns)
    assert curve[0] == 2 and curve[3].tolist() == [0.5, 0, 0]
    for name, value, message in (
        ("image", np.ones(3, np.int64), "out of range"),
        ("image", -np.ones(3, np.int64), "out of range"),
        ("truth_image", np.ones(2, np.int64), "out of range"),
        ("score", np.ones(2), "differ in length"),
        ("box", np.ones((3, 3)), "differ in length"),
        ("truth_counted_box", np.ones((1, 4)), "differ in length"),
        ("truth_region", np.zeros(1, bool), "differ in length"),
        ("truth_countable", np.zeros(3, np.uint64), "differ in length"),
        ("heights", np.ones((65, 2)), "more than 64"),
        ("heights", np.ones((1, 3)), "differ in length"),
    ):
        with pytest.raises(ValueError, match=message):
            matching.trace_setups(**columns | {name: value})
    with pytest.raises(ValueError, match="not by image"):
        matching.trace_setups(**columns | {"images": 2, "truth_image": np.array([1, 0], np.int64)})


# ----------------------------------------------------------------------------- which one runs


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl is 'fused'; choose one of None, compiled, ref"):
        evaluate_miss_rate(truth([]), [], impl="fused")


def test_the_choice_is_the_one_that_runs(monkeypatch):
    def stop(*args, **kwargs):
        raise AssertionError("the other one runs")

    people, detections = [person(1, 0, (0, 0, 25, 60))], [found(0, (0, 0, 25, 60), 0.5)]
    monkeypatch.setattr(matching, "_trace_reference", stop)
    monkeypatch.setattr(coco_rows, "_read_annotations", stop)
    for impl in (None, "compiled"):
        assert evaluate_miss_rate(truth(people), detections, impl=impl)["All"].miss_rate == 0
    monkeypatch.undo()
    monkeypatch.setattr(matching, "_trace_compiled", stop)
    for name in ("read_annotations", "read_detections"):
        monkeypatch.setattr(coco_rows, name, stop)
    assert evaluate_miss_rate(truth(people), detections, impl="reference")["All"].miss_rate == 0


SCORE = """
truth = {"images": [{"id": 0}], "categories": [{"id": 1}], "annotations": []}
print(evaluate_miss_rate(truth, [])["All"].miss_rate, COMPILED)
"""


@pytest.mark.parametrize("compiled", [True, False])
def test_neither_needs_torch(compiled):
    done = run_code(
        "import sys; sys.modules.update(torch=None, detectron2=None)\n"
        + ("" if compiled else "sys.modules['hkd_d2._native'] = None\n")
        + "from hkd_d2.evaluation.miss_rate import COMPILED, evaluate_miss_rate"
        + SCORE
        + ("" if compiled else "evaluate_miss_rate(truth, [], impl='compiled')"),
        status=0 if compiled else 1,
    )
    assert done.stdout.split() == ["-100.0", str(compiled)], done.stderr
    if not compiled:
        assert "RuntimeError: impl is 'compiled', but hkd_d2._native is not compiled" in done.stderr


def test_a_module_of_an_older_state_is_said(tmp_path):
    (tmp_path / "_native.py").write_text("")
    done = run_code(
        f"import hkd_d2; hkd_d2.__path__.insert(0, {str(tmp_path)!r})\n"
        "from hkd_d2.evaluation.miss_rate import COMPILED, evaluate_miss_rate" + SCORE
    )
    assert done.stdout.split() == ["-100.0", "False"], done.stderr
    assert "hkd_d2._native does not fit this version of hkd_d2" in done.stderr
