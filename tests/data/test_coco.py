import json

import pytest
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from hkd_d2.data import training_counts
from hkd_d2.data.datasets import load_coco


def coco():
    """Two images, the second without annotations; two classes."""
    return {
        "categories": [{"id": 7, "name": "rider"}, {"id": 3, "name": "pedestrian"}],
        "images": [
            {"id": 5, "file_name": "a/1.jpg", "height": 100, "width": 200},
            {"id": 0, "im_name": "2.jpg", "height": 100, "width": 200},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [1, 2, 30, 40]},
            {
                "id": 2,
                "image_id": 5,
                "category_id": 3,
                "bbox": [-5, 2, 30, 60],
                "vis_bbox": [0, 2, 15, 30],
                "ignore": 0,
                "iscrowd": 0,
            },
            {"id": 3, "image_id": 5, "category_id": 3, "bbox": [9, 9, 20, 60], "vis_ratio": 0.4},
            {"id": 4, "image_id": 5, "category_id": 3, "bbox": [50, 9, 90, 60], "iscrowd": 1},
        ],
    }


@pytest.fixture
def write(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    (tmp_path / "2.jpg").touch()

    def write(content):
        path = tmp_path / "gt.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path), str(tmp_path)

    return write


def test_records(write):
    json_file, root = write(coco())
    records = load_coco(json_file, root, "test_coco_records")
    assert [(r["file_name"], r["image_id"]) for r in records] == [
        (f"{root}/a/1.jpg", 5),
        (f"{root}/2.jpg", 0),
    ]
    assert (records[0]["height"], records[0]["width"]) == (100, 200)
    assert records[1]["annotations"] == []
    rows = records[0]["annotations"]
    # Classes in the order of the ids: 3 pedestrian, 7 rider.
    assert [a["category_id"] for a in rows] == [1, 0, 0, 0]
    metadata = MetadataCatalog.get("test_coco_records")
    assert metadata.thing_classes == ["pedestrian", "rider"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert [a["vis_ratio"] for a in rows] == [1.0, 0.25, 0.4, 1.0]  # 15 * 30 / (30 * 60)
    assert [a["ignore"] for a in rows] == [0, 0, 0, 1]
    assert [a["iscrowd"] for a in rows] == [0, 0, 0, 1]
    assert rows[1]["vis_bbox"] == [0, 2, 15, 30] and "vis_bbox" not in rows[0]
    assert rows[1]["bbox"] == [-5, 2, 30, 60] and rows[1]["bbox_mode"] == BoxMode.XYWH_ABS


def test_one_class_file(write):
    content = coco()
    content["categories"] = [{"id": i, "name": f"class {i}"} for i in (1, 2, 0)]
    for row in content["annotations"]:
        row["category_id"] = 1
    records = load_coco(*write(content), "test_coco_one_class")
    assert {a["category_id"] for a in records[0]["annotations"]} == {0}
    assert MetadataCatalog.get("test_coco_one_class").thing_classes == ["class 1"]


def test_ignored_rows_may_cover_nothing(write):
    content = coco()
    content["annotations"][0].update(bbox=[500, 2, 30, 40], ignore=1)
    content["annotations"][3].update(bbox=[5, 2, 0, 40])
    rows = load_coco(*write(content))[0]["annotations"]
    assert rows[0]["bbox"] == [500, 2, 30, 40] and rows[3]["bbox"] == [5, 2, 0, 40]


def row(**keys):
    return lambda content: content["annotations"][1].update(keys)


def without(key):
    return lambda content: content["annotations"][1].pop(key)


ERRORS = [
    (lambda c: c.pop("images"), r"gt.json: no COCO annotation file, it has no list 'images'"),
    (lambda c: c.update(categories={}), "no list 'categories'"),
    (lambda c: c.update(images=[]), "gt.json: the list of images is empty"),
    (lambda c: c["images"][1].update(id=5), r"images\[1\]: image id 5 is used twice"),
    (lambda c: c["images"][0].update(height=0), r"images\[0\]: height and width must be positive"),
    (lambda c: c["images"][0].pop("width"), r"images\[0\]: 'width' is missing"),
    (lambda c: c["images"][1].pop("im_name"), r"images\[1\]: 'im_name' is missing"),
    (lambda c: c["categories"][0].pop("name"), r"categories\[0\]: 'name' is missing"),
    (lambda c: c["annotations"].__setitem__(1, 3), r"annotations\[1\]: 'category_id' is missing"),
    (without("bbox"), r"annotations\[1\]: 'bbox' is missing"),
    (without("image_id"), r"annotations\[1\]: 'image_id' is missing"),
    (row(image_id=99), r"annotations\[1\]: image_id 99 is not in the list of images"),
    (row(category_id=99), r"annotations\[1\]: category_id 99 is not in the list of categories"),
    (row(bbox=[1, 2, 3]), r"annotations\[1\]: bbox must be four finite numbers"),
    (row(bbox=[1, 2, float("nan"), 4]), r"annotations\[1\]: bbox must be four finite numbers"),
    (row(bbox=[1, 2, 10**400, 4]), r"annotations\[1\]: bbox must be four finite numbers"),
    (row(bbox=[1, 2, "3", 4]), r"annotations\[1\]: bbox must be four finite numbers"),
    (row(vis_bbox=[0, 0, float("inf"), 1]), r"annotations\[1\]: vis_bbox must be four finite"),
    (row(bbox=[50, 2, -3, 4]), r"annotations\[1\]: bbox .* negative width"),
    (row(bbox=[1, 2, 0, 4]), r"annotations\[1\]: bbox .* no area inside the 200x100 image"),
    (row(bbox=[-9, 2, 9, 4]), r"annotations\[1\]: bbox .* no area inside"),
    (row(bbox=[1, 100, 9, 4]), r"annotations\[1\]: bbox .* no area inside"),
    (row(ignore=2), r"annotations\[1\] has ignore 2; make it 0 or 1"),
    (row(iscrowd="no"), r"annotations\[1\] has iscrowd 'no'; make it 0 or 1"),
    (row(vis_ratio=float("nan")), r"annotations\[1\]: vis_ratio must be a finite number"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_errors_name_the_row(write, change, message):
    content = coco()
    change(content)
    with pytest.raises(ValueError, match=message):
        load_coco(*write(content))


def test_damaged_or_missing_file(write):
    json_file, root = write(json.dumps(coco())[:-40])
    with pytest.raises(ValueError, match="gt.json is not valid JSON.*truncated"):
        load_coco(json_file, root)
    with pytest.raises(ValueError, match="no COCO annotation file"):
        load_coco(*write("[1, 2]"))
    with pytest.raises(FileNotFoundError, match="none.json does not exist or is not a file"):
        load_coco("none.json", root)


def test_missing_image(write):
    json_file, root = write(coco())
    with pytest.raises(
        FileNotFoundError, match=r"1 of 2 images are missing.*elsewhere/a/1.jpg"
    ) as e:
        content = coco()
        content["images"][1]["im_name"] = f"{root}/2.jpg"  # an absolute name stays as it is
        load_coco(write(content)[0], "elsewhere")
    assert "gt.json" in str(e.value)
    assert len(load_coco(json_file, "elsewhere", check_images=False)) == 2


def test_real_frames(shared_data):
    folder = shared_data / "mot17mini"
    records = load_coco(str(folder / "annotations_coco.json"), str(folder / "images"))
    counts = training_counts(records, 0)
    # 39 frames, 950 rows, 814 pedestrians; counted in the file itself.
    assert (counts["images"], counts["rows"], counts["pedestrians"]) == (39, 950, 814)
