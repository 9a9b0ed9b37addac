import pytest
from detectron2.structures import BoxMode

from helpers.rules import rule
from helpers.small_datasets import write_text, write_widerperson
from hkd_d2.data.datasets.widerperson import load_widerperson

ROWS = [(label, 10 * label, 5, 10 * label + 7, 25) for label in (1, 2, 3, 4, 5)]


@rule("Each data set's own rule says what is ignored, and no ignored row is lost")
@pytest.mark.parametrize(
    ("split", "ignore"), [("train", [0, 1, 1, 1, 1]), ("train_persons", [0, 0, 0, 1, 1])]
)
def test_rows(tmp_path, split, ignore):
    write_widerperson(tmp_path, "train", {"000040": ROWS, "000007": []})
    records = load_widerperson(str(tmp_path), split)
    # In the order of the list.
    assert [r["file_name"] for r in records] == [
        str(tmp_path / "Images" / name) for name in ("000040.jpg", "000007.jpg")
    ]
    rows = records[0]["annotations"]
    assert rows[0] == {
        "bbox": [10, 5, 7, 20],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "ignore": 0,
        "vis_ratio": 1,
        "label": 1,
    }
    assert [
        (r["label"], *r["bbox"][:2], r["bbox"][0] + r["bbox"][2], r["bbox"][1] + r["bbox"][3])
        for r in rows
    ] == ROWS
    assert [row["ignore"] for row in rows] == ignore
    assert [row["iscrowd"] for row in rows] == [0, 0, 0, 0, 1]
    assert records[1]["annotations"] == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((6, 1, 2, 3, 4), "class 1 to 5 is expected, not '6 1 2 3 4'"),
        ((1, 1, 2, 3), "'class x1 y1 x2 y2' with a class 1 to 5 is expected, not '1 1 2 3'"),
        ((1, "a", 2, 3, 4), "is expected, not '1 a 2 3 4'"),
        ((1, "nan", 2, 3, 4), "must be four finite numbers"),
        ((1, 9, 2, 3, 4), "negative width"),
        ((1, 5, 2, 5, 4), "has no area inside the 160x120 image"),
    ],
)
def test_malformed_row(tmp_path, row, message):
    write_widerperson(tmp_path, "val", {"000040": [*ROWS, row]})
    with pytest.raises(ValueError, match=f"000040.jpg.txt: line 7: .*{message}"):
        load_widerperson(str(tmp_path), "val")


def test_damaged_files(tmp_path):
    write_widerperson(tmp_path, "val", {"000040": ROWS})
    path = tmp_path / "Annotations" / "000040.jpg.txt"
    lines = path.read_text().splitlines()
    for text in (lines[:-1], [], lines[1:]):
        write_text(path, *text)
        with pytest.raises(
            ValueError, match="000040.jpg.txt: the first line must be the number of"
        ):
            load_widerperson(str(tmp_path), "val")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="000040.jpg.txt does not exist or is not a file"):
        load_widerperson(str(tmp_path), "val")
    write_text(tmp_path / "val.txt", "")
    with pytest.raises(ValueError, match="val.txt: the list of images is empty"):
        load_widerperson(str(tmp_path), "val")
