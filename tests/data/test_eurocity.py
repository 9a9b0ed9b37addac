import json

import pytest
from detectron2.structures import BoxMode

from helpers.rules import rule
from helpers.small_datasets import child, write_eurocity
from hkd_d2.data.datasets.eurocity import load_eurocity

IMAGE = "basel/basel_00000"


@rule("Each data set's own rule says what is ignored, and no ignored row is lost")
def test_rows(tmp_path):
    bicycle = child("bicycle", 60, 50, 90, 80)
    companion = child("co-rider", 62, 30, 80, 70)
    children = [
        child("pedestrian", 20, 30.5, 50, 90.5, "occluded>40", "truncated>10", "skating"),
        child("pedestrian", 100, 30, 110, 60, "sitting-lying"),
        child("pedestrian", 100, 30, 110, 60, "behind-glass", "occluded>10", "occluded>40"),
        child("rider", 60, 20, 90, 80, "truncated>80", children=[bicycle, companion]),
        child("person-group-far-away", 1, 2, 9, 9),
        child("rider+vehicle-group-far-away", 1, 2, 9, 9),
        child("bicycle-group", 0, 60, 160, 120),
        child(None, 1, 2, 9, 9),
    ]
    write_eurocity(tmp_path, "day", "train", {"zuerich/zuerich_00001": [], IMAGE: children})
    records = load_eurocity(str(tmp_path), "day_train")
    assert [r["file_name"] for r in records] == [
        str(tmp_path / "day" / "img" / "train" / name)
        for name in ("basel/basel_00000.png", "zuerich/zuerich_00001.png")
    ]
    rows = records[0]["annotations"]
    assert rows[0] == {
        "bbox": [20, 30.5, 30, 60],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "ignore": 0,
        "vis_ratio": 0.6,  # at least 40 percent are hidden
        "label": "pedestrian",
        "occlusion": 40,
        "truncation": 10,
    }
    # Nested persons follow their parent; vehicles are no persons.
    labels = ["pedestrian"] * 3 + ["rider", "co-rider"]
    labels += ["person-group-far-away", "rider+vehicle-group-far-away", None]
    assert [row["label"] for row in rows] == labels
    assert [row["ignore"] for row in rows] == [0, 1, 1, 1, 1, 1, 1, 1]
    assert [row["iscrowd"] for row in rows] == [0, 0, 0, 0, 0, 1, 1, 0]
    assert [(row["occlusion"], row["truncation"]) for row in rows[:4]] == [
        (40, 10),
        (0, 0),
        (40, 0),
        (0, 80),
    ]
    assert rows[3]["vis_ratio"] == pytest.approx(0.2)
    assert records[1]["annotations"] == []


def test_day_and_night_are_splits(tmp_path):
    write_eurocity(tmp_path, "day", "val", {IMAGE: []})
    write_eurocity(tmp_path, "night", "val", {IMAGE: [child("pedestrian", 1, 2, 9, 9)]})
    assert load_eurocity(str(tmp_path), "day_val")[0]["annotations"] == []
    (record,) = load_eurocity(str(tmp_path), "night_val")
    assert "/night/img/val/" in record["file_name"] and len(record["annotations"]) == 1


MALFORMED = [
    ({"x1": 10**400}, "the numbers x0, y0, x1, y1"),
    ({"x1": None}, "identity, the numbers x0, y0, x1, y1 and a list of tags are expected"),
    ({"tags": "occluded>40"}, "a list of tags are expected"),
    ({"tags": [40]}, "a list of tags are expected"),
    ({"identity": []}, "identity, the numbers"),
    ({"x1": 5}, "negative width"),
    ({"x0": 300, "x1": 310}, "has no area inside the 160x120 image"),
    ({"children": 3}, "children must be a list, not 3"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED)
def test_malformed_row(tmp_path, change, message):
    good = child("pedestrian", 20, 30, 50, 90)
    write_eurocity(tmp_path, "day", "val", {IMAGE: [good, {**good, **change}]})
    with pytest.raises(ValueError, match=rf"basel_00000.json: children\[1\].*{message}"):
        load_eurocity(str(tmp_path), "day_val")
    # The same in a rider's child.
    rider = child("rider", 20, 30, 50, 90, children=[{**good, **change}])
    write_eurocity(tmp_path, "day", "val", {IMAGE: [rider]})
    with pytest.raises(ValueError, match=rf"json: children\[0\].children\[0\].*{message}"):
        load_eurocity(str(tmp_path), "day_val")


def test_malformed_rows_of_another_kind(tmp_path):
    write_eurocity(tmp_path, "day", "val", {IMAGE: [child("bicycle", 20, 30, 10, 90)]})
    with pytest.raises(ValueError, match=r"children\[0\]: bbox .* negative width"):
        load_eurocity(str(tmp_path), "day_val")
    write_eurocity(tmp_path, "day", "val", {IMAGE: ["pedestrian"]})
    with pytest.raises(ValueError, match=r"children\[0\]: identity, the numbers"):
        load_eurocity(str(tmp_path), "day_val")


def test_damaged_file(tmp_path):
    write_eurocity(tmp_path, "day", "val", {IMAGE: []})
    path = tmp_path / "day" / "labels" / "val" / f"{IMAGE}.json"
    frame = json.loads(path.read_text())
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="basel_00000.json is not valid JSON .*truncated"):
        load_eurocity(str(tmp_path), "day_val")
    for change, message in (
        ({"identity": "seqlist"}, ": no label file of EuroCity Persons"),
        ({"imagewidth": 0}, ": imageheight and imagewidth must be positive, not 120, 0"),
        ({"imageheight": "120"}, " has 'imageheight' '120'; make it a whole number"),
    ):
        path.write_text(json.dumps({**frame, **change}))
        with pytest.raises(ValueError, match=f"basel_00000.json{message}"):
            load_eurocity(str(tmp_path), "day_val")
    path.write_text(json.dumps({**frame, "imageheight": 120.0}))
    assert load_eurocity(str(tmp_path), "day_val")[0]["height"] == 120
    path.write_text("[]")
    with pytest.raises(ValueError, match="basel_00000.json: no label file of EuroCity Persons"):
        load_eurocity(str(tmp_path), "day_val")
