import pytest
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image

from helpers.rules import rule
from helpers.small_datasets import person, write_crowdhuman, write_text
from hkd_d2.data.datasets.crowdhuman import load_crowdhuman


@rule("Each data set's own rule says what is ignored, and no ignored row is lost")
def test_rows(tmp_path):
    # IDs have commas, full boxes leave the image, the keys of extra and head_attr are optional.
    rows = [
        person(72, 20, 20, 90, vbox=[72, 20, 20, 45]),
        person(-10, 50, 30, 100, extra={"ignore": 1}),
        person(5, 6, 7, 8, tag="mask", extra={}, head_attr={}),
        person(9, 9, 20, 30, head_attr={"ignore": 1}, extra={"ignore": 0}),
    ]
    del rows[3]["hbox"], rows[3]["vbox"]
    write_crowdhuman(
        tmp_path, "train", {"273271,c9db000d5146c15": rows, "284193,faa9000f2678b5e": []}
    )
    records = load_crowdhuman(str(tmp_path), "train")
    assert [r["file_name"] for r in records] == [
        str(tmp_path / "Images" / f"{name}.jpg")
        for name in ("273271,c9db000d5146c15", "284193,faa9000f2678b5e")
    ]
    loaded = records[0]["annotations"]
    assert loaded[0] == {
        "bbox": [72, 20, 20, 90],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "ignore": 0,
        "vis_bbox": [72, 20, 20, 45],
        "vis_ratio": 0.5,  # 20 * 45 of 20 * 90
        "label": "person",
    }
    assert [row["bbox"] for row in loaded] == [row["fbox"] for row in rows]
    # A mask is ignored without the flag too; the head's flag is not the person's.
    assert [row["ignore"] for row in loaded] == [0, 1, 1, 0]
    assert [row["label"] for row in loaded] == ["person", "person", "mask", "person"]
    assert "vis_bbox" not in loaded[3] and loaded[3]["vis_ratio"] == 1
    assert records[1]["annotations"] == []


def test_image_size_is_as_detectron2_reads_it(tmp_path, draw):
    write_crowdhuman(tmp_path, "val", {"1,a": []})
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    Image.new("RGB", (80, 50)).save(tmp_path / "Images" / "1,a.jpg", exif=turned)
    (record,) = load_crowdhuman(str(tmp_path), "val")
    assert (record["height"], record["width"]) == (80, 50)
    assert read_image(record["file_name"]).shape == (80, 50, 3)
    assert draw("crowdhuman", tmp_path, "val")["pedestrian"] == 0
    (tmp_path / "Images" / "1,a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="The image '.*1,a.jpg' cannot be read"):
        load_crowdhuman(str(tmp_path), "val")


def test_ignored_row_of_negative_size(tmp_path):
    row = person(10, 10, -4, 20, tag="mask", vbox=[10, 10, -4, 20])
    write_crowdhuman(tmp_path, "val", {"1,a": [row]})
    (record,) = load_crowdhuman(str(tmp_path), "val")
    assert record["annotations"][0]["bbox"] == [10, 10, 0, 20]
    write_crowdhuman(tmp_path, "val", {"1,a": [{**row, "tag": "person"}]})
    with pytest.raises(ValueError, match="negative width"):
        load_crowdhuman(str(tmp_path), "val")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (person(1, 2, 3, 4, fbox=[1, 2, 3, "4"]), "bbox must be four finite numbers"),
        (person(1, 2, 3, 4, tag="mask", fbox=[1, 2, 3, "4"]), "bbox must be four finite numbers"),
        (person(1, 2, 3, 4, tag="mask", fbox=[1, 2, None, 4]), "bbox must be four finite numbers"),
        (person(1, 2, 3, 4, vbox=[1, 2]), "vis_bbox must be four finite numbers"),
        (person(1, 2, 3, 4, fbox=[1, 2, 3]), "bbox must be four finite numbers"),
        (person(200, 2, 3, 4), "has no area inside the 160x120 image"),
        (person(1, 2, 3, 4, extra={"ignore": 2}), "ignore must be 0 or 1"),
        (person(1, 2, 3, 4, extra=[]), "'extra' is an object"),
        (person(1, 2, 3, 4, tag="dog"), "the tag person or mask"),
        ("person", "the tag person or mask"),
    ],
)
def test_malformed_row(tmp_path, row, message):
    write_crowdhuman(tmp_path, "val", {"1,a": [person(1, 2, 3, 4)], "b": [person(1, 2, 3, 4), row]})
    with pytest.raises(
        ValueError, match=rf"annotation_val.odgt: line 2: gtboxes\[1\]: .*({message})"
    ):
        load_crowdhuman(str(tmp_path), "val")


def test_damaged_file(tmp_path):
    write_crowdhuman(tmp_path, "val", {"1,a": [], "b": [person(1, 2, 3, 4)]})
    path = tmp_path / "annotation_val.odgt"
    text = path.read_text()
    path.write_text(text[:-20])
    with pytest.raises(ValueError, match="val.odgt: line 2 is not valid JSON .*truncated"):
        load_crowdhuman(str(tmp_path), "val")
    path.write_text("")
    with pytest.raises(ValueError, match="val.odgt: the file is empty"):
        load_crowdhuman(str(tmp_path), "val")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="val.odgt is no text file"):
        load_crowdhuman(str(tmp_path), "val")
    write_text(path, '{"ID": "b"}')
    with pytest.raises(ValueError, match="line 1 has no text 'ID' and list 'gtboxes'"):
        load_crowdhuman(str(tmp_path), "val")
    write_text(path, '{"ID": "b", "gtboxes": []}', '{"ID": "b", "gtboxes": []}')
    with pytest.raises(ValueError, match="line 2: the ID 'b' stands twice"):
        load_crowdhuman(str(tmp_path), "val")
