"""The rules by which every reader takes a row of a COCO file."""

import subprocess
import sys

import pytest

from hkd_d2.data.annotation_rules import (
    ignore_flags,
    pedestrian_category,
    row_height,
    visible_share,
    whole_number,
)


def test_ignore_is_iscrowd_where_missing():
    assert ignore_flags({}, "row") == (0, 0)
    assert ignore_flags({"iscrowd": 1}, "row") == (1, 1)
    assert ignore_flags({"iscrowd": 1, "ignore": 0}, "row") == (0, 1)
    assert ignore_flags({"ignore": True}, "row") == (1, 0)
    for flag in (2, None, "no"):
        with pytest.raises(ValueError, match="row has iscrowd .*; make it 0 or 1"):
            ignore_flags({"ignore": 0, "iscrowd": flag}, "row")


def test_height_and_visible_share():
    row = {"bbox": [0, 0, 20, 50]}
    assert row_height(row, "row") == 50
    assert row_height(row | {"height": None}, "row") == 50
    assert row_height(row | {"height": 60}, "row") == 60
    assert visible_share(row, "row") == 1
    assert visible_share(row | {"vis_bbox": [0, 0, 20, 25]}, "row") == 0.5
    assert visible_share(row | {"vis_bbox": [0, 0, 20, 25], "vis_ratio": 0.6}, "row") == 0.6
    assert visible_share({"bbox": [0, 0, 0, 50], "vis_bbox": [0, 0, 0, 50]}, "row") == 0
    with pytest.raises(ValueError, match="row has height -1"):
        row_height(row | {"height": -1}, "row")
    with pytest.raises(ValueError, match="row has vis_ratio nan"):
        visible_share(row | {"vis_ratio": float("nan")}, "row")
    with pytest.raises(ValueError, match="row has vis_bbox"):
        visible_share(row | {"vis_bbox": [0, 0]}, "row")


def test_whole_numbers():
    assert whole_number(192.0, "width", "row") == 192
    for value in (1.5, "1", None, True, float("inf")):
        with pytest.raises(ValueError, match="row has width .*make it a whole number"):
            whole_number(value, "width", "row")


@pytest.mark.parametrize(
    ("names", "used", "expected"),
    [
        ({1: "rider", 2: "pedestrian"}, {1, 2}, 2),
        ({0: "person", 3: "car"}, {0}, 0),
        ({1: "person", 2: "Pedestrian"}, {1, 2}, 2),
        ({3: "walker"}, set(), 3),
        ({0: "ignore region", 1: "walker", 2: "rider"}, {1}, 1),
        ({1: None, 2: None}, {1, 2}, 1),
        ({}, {7}, 7),
        ({}, set(), 1),
    ],
)
def test_category_of_the_pedestrians(names, used, expected):
    categories = [{"id": number, "name": name} for number, name in names.items()]
    assert pedestrian_category(categories, used, "file") == expected


@pytest.mark.parametrize(
    ("names", "used", "listed"),
    [
        ({1: "walker", 2: "rider"}, {1, 2}, "1 'walker', 2 'rider'"),
        ({1: "person", 2: "person"}, {1, 2}, "1 'person', 2 'person'"),
        ({}, {3, 2}, "rows of 2, 3"),
    ],
)
def test_a_category_that_is_not_told_is_refused_with_all_names(names, used, listed):
    categories = [{"id": number, "name": name} for number, name in names.items()]
    with pytest.raises(ValueError, match=listed):
        pedestrian_category(categories, used, "file")


def test_the_rules_need_nothing_but_python():
    code = (
        "import sys; import hkd_d2.data.annotation_rules, hkd_d2.data.text_files; "
        "print({'numpy', 'torch', 'detectron2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
