import pytest
from detectron2.structures import BoxMode

from helpers.rules import rule
from helpers.small_datasets import write_pennfudan
from hkd_d2.data.datasets.pennfudan import load_pennfudan


@rule("Each data set's own rule says what is ignored, and no ignored row is lost")
def test_rows(tmp_path):
    write_pennfudan(
        tmp_path, {"PennPed00001": [(1, 1, 160, 120)], "FudanPed00001": [(21, 31, 50, 90)] * 2}
    )
    records = load_pennfudan(str(tmp_path), "all")
    assert [r["file_name"] for r in records] == [
        str(tmp_path / "PNGImages" / name) for name in ("FudanPed00001.png", "PennPed00001.png")
    ]
    assert [len(r["annotations"]) for r in records] == [2, 1]
    # Pixels 21 to 50 counted from 1: 30 of them from 20 on.
    assert records[0]["annotations"][0] == {
        "bbox": [20, 30, 30, 60],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "ignore": 0,
        "vis_ratio": 1,
    }
    assert records[1]["annotations"][0]["bbox"] == [0, 0, 160, 120]  # the whole image


def test_damaged_files(tmp_path):
    write_pennfudan(tmp_path, {"FudanPed00001": [(21, 31, 50, 90), (91, 31, 120, 90)]})
    path = tmp_path / "Annotation" / "FudanPed00001.txt"
    text = path.read_text()

    def refused(content, message):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"FudanPed00001.txt: {message}"):
            load_pennfudan(str(tmp_path), "all")

    refused(text[: text.index("# Details for pedestrian 2")], "2 objects are announced and 1 boxes")
    cut = text[: text.index("(91, 31)") + 4]
    refused(
        cut, r"line 14: '\(Xmin, Ymin\).*' is expected, not 'Bounding box for object 2.* : \(91,'"
    )
    refused(text.replace("50, 90", "50, x"), "line 9: .*is expected")
    refused(text.replace("50, 90", "5, 90"), "line 9: .*negative width")
    refused(text.replace("21, 31", "321, 31").replace("50, 90", "350, 90"), "line 9: .*no area")
    refused(text.replace("Image size", "Size"), "no PASCAL annotation of version 1.00")
    refused("", "no PASCAL annotation of version 1.00")
    # The number before the labels is not relied on.
    path.write_text(text.replace("ground truth : 2", "ground truth : 30"))
    assert len(load_pennfudan(str(tmp_path), "all")[0]["annotations"]) == 2
