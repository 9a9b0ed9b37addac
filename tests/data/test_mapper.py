import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from helpers.rules import rule
from hkd_d2.config import add_hkd_config
from hkd_d2.data import PedestrianMapper

HEIGHT, WIDTH = 60, 80


@pytest.fixture
def record(tmp_path):
    """An image of noise with no annotations."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(pixels).save(path)
    return {
        "file_name": str(path),
        "image_id": 1,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [],
    }


def config():
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (37, 90)
    cfg.INPUT.MIN_SIZE_TEST = 37
    return cfg


def annotation(bbox, **keys):
    return {"bbox": bbox, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, **keys}


def mapper(*augmentations, min_height=0, min_visibility=0.0):
    return PedestrianMapper(
        True,
        augmentations=list(augmentations),
        image_format="BGR",
        min_height=min_height,
        min_visibility=min_visibility,
    )


@rule("Without ignore rows the mapper equals Detectron2's")
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("whole_numbers", [False, True])
def test_equals_detectron2_without_ignore_rows(record, crop, whole_numbers):
    cfg = config()
    cfg.HKD.DATA.MIN_HEIGHT = 0
    cfg.INPUT.CROP.ENABLED = crop
    rng = np.random.default_rng(1)
    for _ in range(20):
        x, y, w, h = rng.uniform([-5, -5, 1, 1], [75, 55, 40, 40])
        box = [int(x), int(y), int(w), int(h)] if whole_numbers else [x, y, w, h]
        record["annotations"].append(annotation(box, category_id=len(record["annotations"]) % 3))
    before = copy.deepcopy(record)
    ours, theirs = PedestrianMapper(cfg, True), DatasetMapper(cfg, True)
    shapes = set()
    for seed in range(8):
        np.random.seed(seed)
        expected = theirs(record)
        state = np.random.get_state()
        np.random.seed(seed)
        got = ours(record)
        assert torch.equal(got["image"], expected["image"])
        assert got["image"].dtype == torch.uint8
        instances, plain = got["instances"], expected["instances"]
        assert torch.equal(instances.gt_boxes.tensor, plain.gt_boxes.tensor)
        assert instances.gt_boxes.tensor.dtype == torch.float32
        assert torch.equal(instances.gt_classes, plain.gt_classes)
        assert instances.image_size == plain.image_size
        assert not instances.gt_ignore.any()
        # Without visible boxes in the record they are the full ones.
        assert torch.equal(instances.gt_visible_boxes.tensor, instances.gt_boxes.tensor)
        assert set(got) == set(expected)
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), state, strict=True))
        shapes.add(got["image"].shape)
    assert len(shapes) > 1  # the augmentations did draw
    assert record == before


def test_inference_equals_detectron2(record):
    record["annotations"] = [annotation([1, 2, 3, 4], ignore=1)]
    cfg = config()
    got, expected = PedestrianMapper(cfg, False)(record), DatasetMapper(cfg, False)(record)
    assert torch.equal(got.pop("image"), expected.pop("image"))
    assert got == expected and "annotations" not in got


def test_ignore_semantics(record):
    record["annotations"] = [
        annotation([1.0, 1.0, 9.0, 50.0], ignore=0, iscrowd=0, vis_ratio=0.65),  # both limits count
        annotation([1, 1, 9, 49.9], ignore=0, iscrowd=0, vis_ratio=1.0),  # too small
        annotation([1, 1, 9, 50], ignore=0, iscrowd=0, vis_ratio=0.649),  # too hidden
        annotation([1, 1, 9, 50], ignore=1, iscrowd=0, vis_ratio=1.0),  # the file's own flag
        annotation([1, 1, 9, 50], ignore=0, iscrowd=1, vis_ratio=1.0),  # a group
        annotation([1, 1, 9, 50]),  # of a data set that knows of none of this
    ]
    # Halving the image changes nothing: heights are those of the original.
    half = T.ResizeTransform(HEIGHT, WIDTH, HEIGHT // 2, WIDTH // 2)
    instances = mapper(half, min_height=50, min_visibility=0.65)(record)["instances"]
    assert instances.gt_ignore.dtype == torch.bool
    assert instances.gt_ignore.tolist() == [False, True, True, True, True, False]
    assert instances.gt_classes.tolist() == [0, -1, -1, -1, -1, 0]
    assert instances.gt_classes.dtype == torch.int64
    assert instances.gt_boxes.tensor[0].tolist() == [0.5, 0.5, 5.0, 25.5]


def test_limits_come_from_the_config(record):
    record["annotations"] = [
        annotation([1, 1, 9, 30], vis_ratio=0.5),
        annotation([1, 1, 9, 40], vis_ratio=0.4),
        annotation([1, 1, 9, 40], vis_ratio=0.5),
    ]
    cfg = config()
    cfg.HKD.DATA.MIN_HEIGHT = 31
    cfg.HKD.DATA.MIN_VISIBILITY = 0.45
    ignore = PedestrianMapper(cfg, True)(record)["instances"].gt_ignore
    assert ignore.tolist() == [True, True, False]


def test_flip_and_clip(record):
    record["annotations"] = [
        annotation([-4, 5, 20, 30], vis_bbox=[0, 10, 16, 20]),
        annotation([70, 40, 20, 30], vis_bbox=[0, 0, 0, 0], ignore=1),  # visible part unknown
    ]
    instances = mapper(T.HFlipTransform(WIDTH))(record)["instances"]
    # x -> 80 - x; then clipped to 80 x 60.
    expected = [[64, 5, 80, 35], [0, 40, 10, 60]]
    assert instances.gt_boxes.tensor.tolist() == expected
    assert instances.gt_visible_boxes.tensor.tolist() == [[64, 10, 80, 30], [0, 40, 10, 60]]
    assert instances.gt_visible_boxes.tensor.dtype == torch.float32


def test_crop(record):
    record["annotations"] = [
        annotation([10, 10, 30, 40], vis_bbox=[15, 10, 20, 20]),  # cut
        annotation([0, 10, 30, 40], vis_bbox=[0, 10, 10, 40]),  # the visible part is cut away
        annotation([0, 0, 20, 40]),  # outside
        annotation([60, 0, 10, 10], ignore=1),  # outside
        annotation([50, 0, 30, 10], ignore=1),  # cut
    ]
    instances = mapper(T.CropTransform(20, 0, 40, HEIGHT))(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[0, 10, 20, 50], [0, 10, 10, 50], [30, 0, 40, 10]]
    visible = instances.gt_visible_boxes.tensor.tolist()
    assert visible == [[0, 10, 15, 30], [0, 10, 10, 50], [30, 0, 40, 10]]
    assert instances.gt_ignore.tolist() == [False, False, True]
    assert instances.image_size == (HEIGHT, 40)


def test_image_without_rows(record):
    instances = mapper()(record)["instances"]
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == instances.gt_visible_boxes.tensor.shape == (0, 4)
    assert instances.gt_ignore.dtype == torch.bool and instances.gt_classes.dtype == torch.int64


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_damaged_image(record, tmp_path, suffix):
    path = tmp_path / f"damaged.{suffix}"
    Image.open(record["file_name"]).save(path)
    content = path.read_bytes()
    record["file_name"] = str(path)
    for damaged in (content[: len(content) // 2], b"", b"no image"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"damaged.{suffix}' cannot be read"):
            mapper()(record)
    path.unlink()
    with pytest.raises(ValueError, match=f"damaged.{suffix}' does not exist"):
        mapper()(record)


def test_image_of_another_size(record):
    record["width"] = 81
    with pytest.raises(ValueError, match="is 80x60 pixels and its annotation says 81x60"):
        mapper()(record)


@pytest.mark.parametrize("key", ["MASK_ON", "LOAD_PROPOSALS"])
def test_boxes_only(key):
    cfg = config()
    cfg.MODEL[key] = True
    with pytest.raises(ValueError, match=f"PedestrianMapper gives boxes only.*{key}"):
        PedestrianMapper(cfg, True)


def test_train_loader_keeps_images_without_positives(record, tmp_path):
    records = []
    rows = [[], [annotation([1, 1, 9, 50], iscrowd=1, ignore=1)], [annotation([1, 1, 9, 50])]]
    for i, annotations in enumerate(rows):
        records.append({**record, "image_id": i, "annotations": annotations})
    DatasetCatalog.register("test_mapper_loader", lambda: records)
    MetadataCatalog.get("test_mapper_loader").thing_classes = ["pedestrian"]
    try:
        cfg = config()  # switches FILTER_EMPTY_ANNOTATIONS off
        cfg.DATASETS.TRAIN = ("test_mapper_loader",)
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.SOLVER.IMS_PER_BATCH = 1
        loader = iter(build_detection_train_loader(cfg, mapper=PedestrianMapper(cfg, True)))
        assert {next(loader)[0]["image_id"] for _ in range(12)} == {0, 1, 2}
    finally:
        DatasetCatalog.remove("test_mapper_loader")
        MetadataCatalog.remove("test_mapper_loader")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("form", ["BGR", "RGB", "L"])
def test_pixels_are_those_of_detectron2(record, tmp_path, mode, form):
    record["file_name"] = str(tmp_path / "other.tif")
    Image.open(tmp_path / "noise.png").convert(mode).save(record["file_name"])
    options = {"augmentations": [], "image_format": form}
    ours = PedestrianMapper(True, min_height=0, min_visibility=0, **options)(record)
    assert torch.equal(ours["image"], DatasetMapper(True, **options)(record)["image"])


def test_a_picture_of_which_nothing_is_left(record):
    Image.new("RGB", (2000, 1)).save(record["file_name"])
    record.update(width=2000, height=1)
    with pytest.raises(ValueError, match="noise.png' of 2000x1 pixels cannot be resized"):
        mapper(T.ResizeShortestEdge([60, 60], 90))(record)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_says_one_sentence(record, workers):
    Path(record["file_name"]).write_bytes(b"no image")
    loader = build_detection_train_loader(
        [record], mapper=mapper(), total_batch_size=1, num_workers=workers
    )
    with pytest.raises(ValueError) as caught:
        next(iter(loader))
    sentence = str(caught.value)
    assert sentence.startswith(f"The image '{record['file_name']}' cannot be read; ")
    assert "\n" not in sentence
