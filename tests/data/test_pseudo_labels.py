"""Files of pseudo-labels: what is written is what is read, and what is refused."""

import hashlib
import json
import os

import pytest
from detectron2.structures import BoxMode

from helpers.pseudo_labelled import POOL_BOX_XYWH, pseudo_labels_of, write_images
from helpers.rules import rule
from hkd_d2.data.pseudo_labels import (
    FORMAT,
    check_pseudo_label_teacher,
    file_sha256,
    in_classes_of,
    read_pseudo_labels,
    write_pseudo_labels,
)

pytestmark = rule("Pseudo-labels are what Detectron2 detects")


@pytest.fixture
def records(tmp_path):
    return write_images(tmp_path / "images", 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "files" / "file.json"


def test_a_pool_is_read_as_it_was_written(records, path, tmp_path):
    classes = ["person", "car"]
    write_pseudo_labels(str(path), pseudo_labels_of(records, classes, labels=(1, 0, 1)))
    assert os.listdir(path.parent) == ["file.json"]
    content = json.loads(path.read_text())
    assert content["info"]["format"] == FORMAT
    assert content["info"]["image_root"] == str(tmp_path / "images")
    assert content["images"][1] == {"id": 2, "file_name": "002.png", "height": 64, "width": 96}
    row = content["annotations"][3]
    assert (row["id"], row["image_id"], row["category_id"], row["score"]) == (4, 2, 2, 0.75)
    assert row["bbox"] == POOL_BOX_XYWH and row["area"] == 22 * 54

    pseudo = read_pseudo_labels(str(path))
    assert pseudo.classes == classes
    assert [r["file_name"] for r in pseudo.records] == [r["file_name"] for r in records]
    rows = pseudo.records[2]["annotations"]
    assert [r["category_id"] for r in rows] == [1, 0, 1]
    assert rows[0]["bbox"] == POOL_BOX_XYWH and rows[0]["bbox_mode"] == BoxMode.XYWH_ABS
    assert not rows[0]["ignore"] and not rows[0]["iscrowd"]


def test_detections_of_the_first_class_alone_keep_the_class_list(records, path):
    # A COCO file of category 1 alone is else read as one of one class.
    write_pseudo_labels(str(path), pseudo_labels_of(records, ["person", "car"], labels=(0,)))
    pseudo = read_pseudo_labels(str(path))
    assert pseudo.classes == ["person", "car"]
    assert pseudo.records[0]["annotations"][0]["category_id"] == 0


def test_only_pseudo_labels_are_replaced(records, path):
    pseudo = pseudo_labels_of(records)
    write_pseudo_labels(str(path), pseudo)
    write_pseudo_labels(str(path), pseudo_labels_of(records[:1]))
    assert len(read_pseudo_labels(str(path)).records) == 1
    for other in ("mine", '{"info": {"format": "other"}}', "[]"):
        path.write_text(other)
        with pytest.raises(
            ValueError, match="file.json is there already and holds no pseudo-labels"
        ):
            write_pseudo_labels(str(path), pseudo)
        assert path.read_text() == other and os.listdir(path.parent) == ["file.json"]


def test_an_interrupted_write_leaves_the_old_pool(records, path):
    write_pseudo_labels(str(path), pseudo_labels_of(records))
    before = path.read_text()
    with pytest.raises(TypeError):  # no JSON, found half-way
        write_pseudo_labels(str(path), {**pseudo_labels_of(records), "annotations": [object()]})
    assert path.read_text() == before and os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda c: c["info"].pop("format"), "no pseudo-labels, its info does not say so"),
        (lambda c: c.pop("info"), "no pseudo-labels"),
        (lambda c: c["info"].pop("teacher_sha256"), "damaged, its info has no 'teacher_sha256'"),
        (lambda c: c["info"].pop("image_root"), "damaged, its info has no 'image_root'"),
        (lambda c: c["categories"][0].update(id=7), "damaged, its categories are not numbered"),
        (lambda c: c["annotations"].clear(), "the file is empty, 3 images and 0 detections"),
        (lambda c: c["images"].clear(), "the file is empty, 0 images and 3 detections"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2]), r"annotations\[1\]: bbox must be four"),
    ],
)
def test_damaged_and_empty_pools(records, path, harm, sentence):
    write_pseudo_labels(str(path), pseudo_labels_of(records))
    content = json.loads(path.read_text())
    harm(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"file.json: .*{sentence}|file.json: {sentence}"):
        read_pseudo_labels(str(path))


def test_truncated_and_missing(records, path):
    with pytest.raises(FileNotFoundError, match="file.json does not exist or is not a file"):
        read_pseudo_labels(str(path))
    write_pseudo_labels(str(path), pseudo_labels_of(records))
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="file.json is not valid JSON"):
        read_pseudo_labels(str(path))
    again = pseudo_labels_of(records)
    path.unlink()
    write_pseudo_labels(str(path), again)
    os.unlink(records[1]["file_name"])
    with pytest.raises(FileNotFoundError, match="1 of 3 images are missing"):
        read_pseudo_labels(str(path))


def test_classes_of_the_student(records, path):
    write_pseudo_labels(
        str(path), pseudo_labels_of(records, ["person", "car", "dog"], labels=(0, 2, 1))
    )
    pseudo = read_pseudo_labels(str(path))
    # Student class 0 is the dog, class 1 the person; the car is nobody's.
    rows = in_classes_of(pseudo, ["hound", "human"], [2, 0])[0]["annotations"]
    assert [r["category_id"] for r in rows] == [1, 0]
    assert [r["category_id"] for r in pseudo.records[0]["annotations"]] == [0, 2, 1]
    with pytest.raises(ValueError, match="has the classes person, car, dog and DATASETS.TRAIN ped"):
        in_classes_of(pseudo, ["pedestrian"], [])
    for wrong in ([3], [0, 1], [-1]):
        with pytest.raises(
            ValueError, match="does not fit 1 student classes and the 3 of the file"
        ):
            in_classes_of(pseudo, ["pedestrian"], wrong)


def test_another_teacher(records, path, tmp_path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"abc")
    # NIST's example for SHA-256.
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(str(weights)) == sha256 == hashlib.sha256(b"abc").hexdigest()
    write_pseudo_labels(str(path), pseudo_labels_of(records, sha256=sha256))
    pseudo = read_pseudo_labels(str(path))
    check_pseudo_label_teacher(pseudo, str(weights), sha256)
    with pytest.raises(ValueError, match="made by another teacher .*than HKD.TEACHER.WEIGHTS"):
        check_pseudo_label_teacher(pseudo, str(weights), "f" * 64)
    with pytest.raises(FileNotFoundError, match="nowhere.pth' do not exist"):
        file_sha256(str(tmp_path / "nowhere.pth"))
