import json
import shutil

import pytest
from detectron2.structures import BoxMode

from helpers.rules import rule
from helpers.small_datasets import write_bbgt, write_image, write_kaist, write_text
from hkd_d2.data.datasets.kaist import load_kaist

pytestmark = rule("KAIST is read by its toolbox's rules")

ROWS = [
    "person 20 30 30 60 2 20 30 30 15 0 0",
    "person? 60 30 30 60 0 0 0 0 0 0 0",
    "people 100 30 90 60 1 0 0 0 0 0 0",
    "cyclist 200 30 30 60 0 0 0 0 0 0 0",
    "person 300 30 30 60 1 0 0 0 0 1 0",
    "person 700 30 30 60 0 0 0 0 0 0 0",  # outside the image
]
NAMES = ["set06/V000/I00019", "set08/V001/I00039", "set09/V000/I00019"]


def write_json(root, change=lambda content: None):
    """The improved test annotations, with ids from 0, and the images."""
    rows = [(0, 0, 0), (0, 2, 0), (2, 1, 1)]
    content = {
        "info": {"publish": "CVPR 2015"},
        "images": [
            {"id": i, "im_name": name, "height": 512, "width": 640} for i, name in enumerate(NAMES)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "category_id": 1,
                "bbox": [50 + i, 212, 20, 50],
                "height": 50,
                "occlusion": occlusion,
                "ignore": ignore,
            }
            for i, (image, occlusion, ignore) in enumerate(rows)
        ],
        "categories": [
            {"id": i, "name": name}
            for i, name in enumerate(["__ignore__", "person", "cyclist", "people", "person?"])
        ],
    }
    change(content)
    write_text(root / "kaist_annotations_test20.json", json.dumps(content, indent=4))
    for name in NAMES:
        folder, frame = name.rsplit("/", 1)
        write_image(root / "images" / folder / "visible" / f"{frame}.jpg", (512, 640))


def test_improved_test_annotations(tmp_path, draw):
    write_json(tmp_path)
    records = load_kaist(str(tmp_path), "test")
    assert [r["image_id"] for r in records] == [0, 1, 2]
    assert records[0]["file_name"] == str(tmp_path / "images/set06/V000/visible/I00019.jpg")
    assert records[0]["annotations"][0] == {
        "bbox": [50, 212, 20, 50],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "ignore": 0,
        "vis_ratio": 1.0,
        "occlusion": 0,
        "id": 0,
    }
    rows = [row for record in records for row in record["annotations"]]
    assert [(row["occlusion"], row["ignore"]) for row in rows] == [(0, 0), (2, 0), (1, 1)]
    day, night = (load_kaist(str(tmp_path), f"test_{time}") for time in ("day", "night"))
    assert day == records[:2] and night == records[2:]
    assert draw("kaist", tmp_path, "test") == {
        "pedestrian": 2,
        "ignored": 1,
        "crowd": 0,
        "visible part": 0,
    }


def test_text_annotations(tmp_path):
    write_kaist(tmp_path, {NAMES[0]: ROWS, NAMES[2]: []})
    records = load_kaist(str(tmp_path), "test_original")
    assert [r["image_id"] for r in records] == [1, 2]
    rows = records[0]["annotations"]
    assert rows[0]["bbox"] == [20, 30, 30, 60]  # as in the file
    assert rows[0]["vis_ratio"] == 0.25 and rows[0]["vis_bbox"] == [20, 30, 30, 15]
    assert [row["ignore"] for row in rows] == [0, 1, 1, 1, 1, 1]
    assert [row["iscrowd"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert [row["occlusion"] for row in rows] == [2, 0, 1, 0, 1, 0]
    assert [row["label"] for row in rows[:4]] == ["person", "person?", "people", "cyclist"]


def test_training_annotations(tmp_path):
    write_kaist(tmp_path, {"set00/V000/I00001": ROWS[:1], "set00/V000/I00003": []})
    shutil.move(tmp_path / "imageSets/test-all-20.txt", tmp_path / "imageSets/train-all-02.txt")
    original = load_kaist(str(tmp_path), "train")
    for i, name in enumerate(("I00001", "I00003")):
        rows = [ROWS[0].replace(" 20 ", " 22 ")] * i
        write_bbgt(tmp_path / "sanitized_annotations" / f"set00_V000_{name}.txt", *rows)
        write_bbgt(tmp_path / "annotations_paired/set00/V000/visible" / f"{name}.txt", *rows)
    for split in ("train_sanitized", "train_paired"):
        records = load_kaist(str(tmp_path), split)
        assert [r["file_name"] for r in records] == [r["file_name"] for r in original]
        assert [len(r["annotations"]) for r in records] == [0, 1]
        assert records[1]["annotations"][0]["bbox"] == [22, 30, 30, 60]
    assert [len(r["annotations"]) for r in original] == [1, 0]


def test_missing_files(tmp_path):
    for split, file in (
        ("test", "kaist_annotations_test20.json"),
        ("train", "train-all-02.txt"),
        ("train_sanitized", "sanitized_annotations"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{file}(: no | does not exist)"):
            load_kaist(str(tmp_path), split)
    write_kaist(tmp_path, {NAMES[0]: []})
    (tmp_path / "annotations" / f"{NAMES[0]}.txt").unlink()
    with pytest.raises(FileNotFoundError, match="I00019.txt(: no | does not exist)"):
        load_kaist(str(tmp_path), "test_original")
    write_text(tmp_path / "imageSets" / "test-all-20.txt", NAMES[0], "I00019")
    write_bbgt(tmp_path / "annotations" / f"{NAMES[0]}.txt")
    with pytest.raises(
        ValueError, match="test-all-20.txt: line 2: a frame such as set00.*'I00019'"
    ):
        load_kaist(str(tmp_path), "test_original")


def test_damaged_files(tmp_path):
    write_kaist(tmp_path, {NAMES[0]: ["person 20 30 30 60 3 0 0 0 0 0 0"]})
    with pytest.raises(ValueError, match="I00019.txt: line 2: .*an occlusion 0 to 2"):
        load_kaist(str(tmp_path), "test_original")
    write_json(tmp_path, lambda content: content["annotations"][1].pop("occlusion"))
    with pytest.raises(ValueError, match="set06/V000/I00019: .* an occlusion 0 to 2"):
        load_kaist(str(tmp_path), "test")
    write_json(tmp_path, lambda content: content["images"][1].update(im_name="I00039"))
    with pytest.raises(ValueError, match="an im_name such as .*, not 'I00039'"):
        load_kaist(str(tmp_path), "test")
    path = tmp_path / "kaist_annotations_test20.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(ValueError, match="test20.json is not valid JSON .*truncated"):
        load_kaist(str(tmp_path), "test")
