import pytest
from detectron2.structures import BoxMode

from helpers.rules import rule
from helpers.small_datasets import write_mot, write_text
from hkd_d2.data.datasets.mot17 import load_mot17
from hkd_d2.data.datasets.mot20 import load_mot20


def classes(flag=1):
    """A row of each class, at a distance of 10 pixels."""
    return [(1, label, 10 * label, 11, 7, 20, flag, label, 0.25) for label in range(1, 14)]


@rule("Each data set's own rule says what is ignored, and no ignored row is lost")
def test_rows(tmp_path):
    write_mot(tmp_path, "MOT17-02-FRCNN", 3, [(3, 9, 1, 1, 8.5, 9, 1, 1, 1), *classes()])
    records = load_mot17(str(tmp_path), "train")
    assert [r["file_name"] for r in records] == [
        str(tmp_path / f"train/MOT17-02-FRCNN/img1/00000{i}.jpg") for i in (1, 2, 3)
    ]
    rows = records[0]["annotations"]
    assert rows[0] == {
        "bbox": [9, 10, 7, 20],  # counted from 0
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "ignore": 0,
        "vis_ratio": 0.25,
        "label": 1,
    }
    # Pedestrian, distractors, crowd; no vehicles and no occluders.
    assert [row["label"] for row in rows] == [1, 2, 7, 8, 12, 13]
    assert [row["ignore"] for row in rows] == [0, 1, 1, 1, 1, 1]
    assert [row["iscrowd"] for row in rows] == [0, 0, 0, 0, 0, 1]
    assert records[1]["annotations"] == []
    assert [row["bbox"] for row in records[2]["annotations"]] == [[0, 0, 8.5, 9]]


def test_vehicles_without_a_motor_are_distractors_in_mot20(tmp_path):
    write_mot(tmp_path, "MOT20-01", 1, classes())
    (record,) = load_mot20(str(tmp_path), "train")
    assert [row["label"] for row in record["annotations"]] == [1, 2, 6, 7, 8, 12, 13]
    assert [row["ignore"] for row in record["annotations"]] == [0] + [1] * 6


def test_pedestrians_that_do_not_count(tmp_path):
    inside, outside = (1, 1, 10, 10, 20, 40, 0, 1, 1), (1, 2, -40, 10, 20, 40, 1, 1, 0)
    partly = (1, 3, -10, 10, 20, 40, 1, 1, 0.5)
    write_mot(tmp_path, "MOT20-01", 1, [inside, outside, partly])
    (record,) = load_mot20(str(tmp_path), "train")
    assert [row["ignore"] for row in record["annotations"]] == [1, 1, 0]
    assert record["annotations"][1]["bbox"] == [-41, 9, 20, 40]


@pytest.mark.parametrize("length", [4, 5])
def test_halves(tmp_path, length):
    for sequence in ("MOT20-02", "MOT20-01"):
        write_mot(tmp_path, sequence, length, [(f, 1, f, 9, 9, 9, 1, 1, 1) for f in (1, 3, 4)])
    whole = load_mot20(str(tmp_path), "train")
    assert [r["image_id"] for r in whole] == list(range(1, 2 * length + 1))
    assert "MOT20-01" in whole[0]["file_name"] and "MOT20-02" in whole[length]["file_name"]
    # Of 4 and of 5 frames the first 3 train.
    train, val = (load_mot20(str(tmp_path), f"{part}_half") for part in ("train", "val"))
    assert train == whole[:3] + whole[length : length + 3]
    assert val == whole[3:length] + whole[length + 3 :]


def test_one_of_the_copies_with_other_detections(tmp_path):
    for name in ("MOT17-02-DPM", "MOT17-02-FRCNN", "MOT17-02-SDP", "MOT17-04-DPM", "MOT17-04-SDP"):
        write_mot(tmp_path, name, 1, [(1, 1, 1, 1, 9, 9, 1, 1, 1)])
    records = load_mot17(str(tmp_path), "train")
    folders = [record["file_name"].split("/")[-3] for record in records]
    assert folders == ["MOT17-02-FRCNN", "MOT17-04-DPM"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((1, 1, 1, 1, 9, 9, 1, 1), "'frame,track,x,y,w,h,flag,class,visibility' is expected"),
        ((3, 1, 1, 1, 9, 9, 1, 1, 1), "a frame up to 2.* not '3,1,1,1,9,9,1,1,1'"),
        ((0, 1, 1, 1, 9, 9, 1, 1, 1), "a frame up to 2"),
        ((1.5, 1, 1, 1, 9, 9, 1, 1, 1), "a frame up to 2"),
        (("nan", 1, 1, 1, 9, 9, 1, 1, 1), "a frame up to 2"),
        (("inf", 1, 1, 1, 9, 9, 1, 1, 1), "a frame up to 2"),
        ((1, 1, 1, 1, 9, 9, 2, 1, 1), "a flag 0 or 1"),
        ((1, 1, 1, 1, 9, 9, 1, 14, 1), "a class 1 to 13"),
        ((1, 1, "x", 1, 9, 9, 1, 1, 1), "is expected"),
        ((1, 1, 1, 1, -9, 9, 1, 1, 1), "negative width"),
        ((1, 1, 9, 9, 0, 9, 1, 1, 1), "has no area"),
        ((1, 1, "nan", 1, 9, 9, 1, 1, 1), "four finite numbers"),
        ((1, 1, 1, 1, 9, 9, 1, 1, "nan"), "vis_ratio must be a finite number"),
        ((1, 1, 1, 1, -9, 9, 0, 3, 1), "negative width"),
    ],
)
def test_malformed_row(tmp_path, row, message):
    write_mot(tmp_path, "MOT17-02-SDP", 2, [(1, 1, 1, 1, 9, 9, 1, 1, 1), row])
    with pytest.raises(ValueError, match=f"MOT17-02-SDP/gt/gt.txt: line 2: .*{message}"):
        load_mot17(str(tmp_path), "train")


def test_damaged_files(tmp_path):
    write_mot(tmp_path, "MOT17-02-SDP", 2, [(1, 1, 1, 1, 9, 9, 1, 1, 1)] * 3)
    path = tmp_path / "train" / "MOT17-02-SDP" / "gt" / "gt.txt"
    path.write_text(path.read_text()[:-6])
    with pytest.raises(
        ValueError, match="gt.txt: line 3: .* if the file ends there, it is truncated"
    ):
        load_mot17(str(tmp_path), "train")
    path.write_text("")
    with pytest.raises(ValueError, match="gt.txt: the file is empty"):
        load_mot17(str(tmp_path), "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="gt.txt does not exist or is not a file"):
        load_mot17(str(tmp_path), "train")


@pytest.mark.parametrize("line", ["[Sequences]", "imWidth=", "imWidth=0", "imWidth 160", ""])
def test_damaged_info(tmp_path, line):
    write_mot(tmp_path, "MOT17-02-SDP", 2, [])
    path = tmp_path / "train" / "MOT17-02-SDP" / "seqinfo.ini"
    lines = path.read_text().splitlines()
    lines[0 if line.startswith("[") else 5] = line
    write_text(path, *lines)
    with pytest.raises(ValueError, match=r"MOT17-02-SDP/seqinfo.ini: \[Sequence\] with imDir"):
        load_mot17(str(tmp_path), "train")


def test_published_lengths():
    """Half of each published sequence, by hand (N // 2 + 1), adds up to the counts."""
    from hkd_d2.data.datasets import mot17, mot20

    lengths = {
        mot17: {600: 301, 1050: 526, 837: 419, 525: 263, 654: 328, 900: 451, 750: 376},
        mot20: {429: 215, 2782: 1392, 2405: 1203, 3315: 1658},
    }
    for module, halves in lengths.items():
        total, half = sum(halves), sum(halves.values())
        counts = [module.PUBLISHED[split]["images"] for split in module.SPLITS]
        assert counts == [total, half, total - half]


def test_another_image_folder_in_the_info(tmp_path):
    write_mot(tmp_path, "MOT17-02-SDP", 2, [(1, 1, 1, 1, 9, 9, 1, 1, 1)])
    path = tmp_path / "train" / "MOT17-02-SDP" / "seqinfo.ini"
    path.write_text(path.read_text().replace("imDir=img1", "imDir=img-1"))
    with pytest.raises(FileNotFoundError, match="seqinfo.ini: 2 of 2 .*MOT17-02-SDP/img-1/"):
        load_mot17(str(tmp_path), "train")
