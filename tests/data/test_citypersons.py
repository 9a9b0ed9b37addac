import json
import logging
import shutil

import pytest
import scipy.io
from detectron2.structures import BoxMode

from hkd_d2.data import training_counts
from hkd_d2.data.datasets import load_citypersons
from hkd_d2.data.datasets.citypersons import to_coco

FORMS = ("cityscapes", "mat", "coco")


def without_labels(records):
    return [
        {
            **r,
            "annotations": [{k: v for k, v in a.items() if k != "label"} for a in r["annotations"]],
        }
        for r in records
    ]


@pytest.mark.parametrize("form", FORMS)
def test_records_of_each_form(write_citypersons, form):
    root = write_citypersons(form)
    records = load_citypersons(str(root), "val")

    # Sorted by file name; the image without rows stays.
    assert [r["image_id"] for r in records] == [1, 2, 3]
    assert [r["file_name"] for r in records] == [
        str(root / "leftImg8bit/val" / name)
        for name in (
            "aachen/aachen_000001_000019_leftImg8bit.png",
            "bonn/bonn_000000_000294_leftImg8bit.png",
            "ulm/ulm_000002_000019_leftImg8bit.png",
        )
    ]
    assert {(r["height"], r["width"]) for r in records} == {(1024, 2048)}
    assert [len(r["annotations"]) for r in records] == [5, 0, 3]

    first = dict(records[0]["annotations"][0])
    assert form == "coco" or first.pop("label") == 1
    assert first == {
        "bbox": [947, 406, 17, 40],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "ignore": 0,
        "vis_bbox": [950, 407, 14, 39],
        "vis_ratio": 546 / 680,  # 14 * 39 / (17 * 40)
    }
    # Only pedestrians count, only groups are crowds; a box may leave the image.
    assert [a["ignore"] for a in records[0]["annotations"]] == [0, 1, 0, 1, 1]
    assert records[0]["annotations"][1]["bbox"] == [-12, 380, 40, 90]
    tall, region, group = records[2]["annotations"]
    assert tall["vis_ratio"] == 0.5
    assert (region["ignore"], region["iscrowd"], region["vis_ratio"]) == (1, 0, 1.0)
    assert (group["ignore"], group["iscrowd"], group["vis_ratio"]) == (1, 1, 0.0)
    assert group["vis_bbox"] == [0, 0, 0, 0]


def test_forms_agree(write_citypersons, caplog):
    root = str(write_citypersons(*FORMS))
    cityscapes, mat, coco = (load_citypersons(root, "val", form=form) for form in FORMS)
    assert cityscapes == mat
    assert without_labels(cityscapes) == coco
    with caplog.at_level(logging.INFO, logger="hkd_d2"):
        assert load_citypersons(root, "val") == cityscapes
    assert "3 images from" in caplog.text and "gtBboxCityPersons" in caplog.text


def test_image_size_is_the_annotation_files(write_citypersons):
    root = write_citypersons("cityscapes")
    for path in root.glob("gtBboxCityPersons/*/*/*.json"):
        content = {**json.loads(path.read_text()), "imgHeight": 192, "imgWidth": 320, "objects": []}
        path.write_text(json.dumps(content))
    sizes = {(r["height"], r["width"]) for r in load_citypersons(str(root), "val")}
    assert sizes == {(192, 320)}


@pytest.mark.parametrize("named", ["bonn/{}", "{}"])
def test_coco_images_with_and_without_folder(write_citypersons, named):
    root = write_citypersons("coco")
    path = root / "annotations" / "val_gt.json"
    content = json.loads(path.read_text())
    before = load_citypersons(str(root), "val")
    image = content["images"][1]
    image["file_name"] = named.format(image.pop("im_name"))
    path.write_text(json.dumps(content))
    assert load_citypersons(str(root), "val") == before


def test_to_coco_reads_back(write_citypersons, tmp_path):
    root = write_citypersons("coco", "mat")
    content = to_coco(load_citypersons(str(root), "val", form="mat"))
    official = json.loads((root / "annotations" / "val_gt.json").read_text())
    assert content["images"] == official["images"]
    assert content["annotations"] == official["annotations"]


def test_training_counts(write_citypersons):
    records = load_citypersons(str(write_citypersons("mat")), "val")
    # Pedestrians: heights 40, 100, 300; visible shares 0.80, 18/41 = 0.44, 0.50.
    expected = {"images": 3, "rows": 8, "pedestrians": 3, "positives": 2, "positive_images": 2}
    assert training_counts(records) == expected
    assert training_counts(records, 40, 0.5)["positives"] == 2
    assert training_counts(records, 40, 0.45)["positive_images"] == 2
    assert training_counts(records, 101, 0.51)["positives"] == 0


@pytest.mark.long
def test_picture(write_citypersons, draw):
    # A group is a crowd; its visible part is not known. One of the rest is seen whole.
    counts = draw("citypersons", write_citypersons("mat"), "val")
    assert counts == {"pedestrian": 3, "ignored": 4, "crowd": 1, "visible part": 4}


# ------------------------------------------------------------------ the published files


@pytest.mark.parametrize(
    ("split", "images", "rows", "pedestrians", "tall", "tall_and_visible"),
    [("train", 2975, 27770, 16526, 12670, 8505), ("val", 500, 5795, 3157, 2549, 1579)],
)
def test_published_counts(
    shared_data, tmp_path, split, images, rows, pedestrians, tall, tall_and_visible
):
    (tmp_path / "annotations").mkdir()
    shutil.copy(shared_data / "citypersons" / f"anno_{split}.mat", tmp_path / "annotations")
    records = load_citypersons(str(tmp_path), split, check_images=False)
    counts = training_counts(records)
    assert (counts["images"], counts["rows"]) == (images, rows)
    assert (counts["pedestrians"], counts["positives"]) == (pedestrians, tall)
    assert training_counts(records, 50, 0.65)["positives"] == tall_and_visible


def test_official_evaluation_file(shared_data, tmp_path):
    (tmp_path / "annotations").mkdir()
    for name in ("anno_val.mat", "val_gt.json"):
        shutil.copy(shared_data / "citypersons" / name, tmp_path / "annotations")
    mat = load_citypersons(str(tmp_path), "val", form="mat", check_images=False)
    official = json.loads((tmp_path / "annotations" / "val_gt.json").read_text())
    assert to_coco(mat) == official
    coco = load_citypersons(str(tmp_path), "val", form="coco", check_images=False)
    assert coco == without_labels(mat)


# ------------------------------------------------------------------ errors


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_missing_things_are_named(write_citypersons, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_citypersons(str(tmp_path / "nowhere"), "val")
    root = write_citypersons("mat")
    with pytest.raises(ValueError, match="splits train and val, not 'test'"):
        load_citypersons(str(root), "test")
    with pytest.raises(ValueError, match="not 'matlab'"):
        load_citypersons(str(root), "val", form="matlab")
    with pytest.raises(FileNotFoundError, match="no annotations of split 'train'.*anno_train.mat"):
        load_citypersons(str(root), "train")
    with pytest.raises(FileNotFoundError, match="anno_train.mat: no such"):
        load_citypersons(str(root), "train", form="mat")
    (root / "gtBboxCityPersons" / "val").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no file <city>/"):
        load_citypersons(str(root), "val")


@pytest.mark.parametrize("form", FORMS)
def test_missing_images_are_counted(write_citypersons, form):
    root = write_citypersons(form)
    for name in ("bonn", "ulm"):
        shutil.rmtree(root / "leftImg8bit" / "val" / name)
    with pytest.raises(FileNotFoundError, match="2 of 3 images are missing, the first is .*bonn_"):
        load_citypersons(str(root), "val")
    assert len(load_citypersons(str(root), "val", check_images=False)) == 3


def test_images_without_annotation_file_are_reported(write_citypersons, caplog):
    root = write_citypersons("cityscapes")
    (root / "leftImg8bit/val/ulm/ulm_9_9_leftImg8bit.png").touch()
    assert len(load_citypersons(str(root), "val")) == 3
    assert "1 images have no annotation file" in caplog.text and "ulm_9_9" in caplog.text


CITYSCAPES_ERRORS = {
    "four finite numbers": lambda c: c["objects"][1].update(bbox=[1, 2, float("nan"), 4]),
    "bboxVis must|vis_bbox must": lambda c: c["objects"][1].update(bboxVis=[1, 2, 3]),
    "label, bbox or bboxVis is missing": lambda c: c["objects"][1].pop("bboxVis"),
    "unknown label 'dog'": lambda c: c["objects"][1].update(label="dog"),
    "negative width": lambda c: c["objects"][1].update(bbox=[9, 9, -5, 9]),
}


@pytest.mark.parametrize("message", CITYSCAPES_ERRORS)
def test_bad_row_of_cityscapes_form(write_citypersons, message):
    root = write_citypersons("cityscapes")
    path = root / "gtBboxCityPersons/val/aachen/aachen_000001_000019_gtBboxCityPersons.json"
    edit(path, CITYSCAPES_ERRORS[message])
    with pytest.raises(
        ValueError, match=rf"000019_gtBboxCityPersons.json: objects\[1\].*({message})"
    ):
        load_citypersons(str(root), "val")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"imgHeight": "1024", "imgWidth": 2, "objects": []}']
)
def test_wrong_form_of_cityscapes_file(write_citypersons, text):
    root = write_citypersons("cityscapes")
    path = root / "gtBboxCityPersons/val/aachen/aachen_000001_000019_gtBboxCityPersons.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match="aachen.*json(: no CityPersons annotation file| has 'imgHeight' '1024')"
    ):
        load_citypersons(str(root), "val")
    path.write_text('{"imgHeight": 1024, "imgW')
    with pytest.raises(ValueError, match="aachen.*json is not valid JSON.*truncated"):
        load_citypersons(str(root), "val")


def test_damaged_mat(write_citypersons):
    root = write_citypersons("mat")
    path = root / "annotations" / "anno_val.mat"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not MATLAB" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="anno_val.mat: not CityPersons' MATLAB file"):
            load_citypersons(str(root), "val")
    scipy.io.savemat(path, {"anno_train_aligned": 1})
    with pytest.raises(ValueError, match="anno_val_aligned with cityname.*could not be read"):
        load_citypersons(str(root), "val")


def test_bad_row_of_mat(write_citypersons, scenes):
    rows = [(1, [10, 10, 20, 60], [10, 10, 20, 60]), (7, [10, 10, 20, 60], [10, 10, 20, 60])]
    root = write_citypersons("mat", scenes={**scenes, "bonn_000000_000294": rows})
    with pytest.raises(ValueError, match="anno_val.mat: bonn_.*png row 2: ten numbers"):
        load_citypersons(str(root), "val")


def test_pedestrian_outside_the_image(write_citypersons, scenes):
    outside = [2048, 10, 20, 60]
    ignored = {**scenes, "bonn_000000_000294": [(0, outside, outside)]}
    root = write_citypersons("mat", scenes=ignored)
    assert load_citypersons(str(root), "val")[1]["annotations"][0]["bbox"] == outside
    root = write_citypersons(
        "mat", scenes={**scenes, "bonn_000000_000294": [(1, outside, outside)]}
    )
    with pytest.raises(ValueError, match="row 1: bbox .* has no area inside the 2048x1024 image"):
        load_citypersons(str(root), "val")


def test_coco_form_with_several_classes(write_citypersons):
    root = write_citypersons("coco")
    edit(
        root / "annotations" / "val_gt.json",
        lambda content: content["annotations"][0].update(category_id=2),
    )
    with pytest.raises(ValueError, match="val_gt.json: CityPersons has one class"):
        load_citypersons(str(root), "val")
