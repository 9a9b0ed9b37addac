"""A run that is stopped and resumed on a CPU ends bit for bit where the uninterrupted one ends."""

import json

import numpy as np
import pytest
from PIL import Image

from helpers.rules import rule
from helpers.runs import resumed_copy, same_end, train
from helpers.small_detectors import one_stage_config, save_teacher


def write_pictures(folder, images=7):
    """Noise pictures of two shapes with a person and an ignore region each."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "pedestrian"}]}
    for i in range(1, images + 1):
        height, width = (64, 96) if i % 3 else (96, 64)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        size = {"height": height, "width": width}
        content["images"].append({"id": i, "file_name": f"{i}.png", **size})
        for bbox, ignore in [([8 + i, 4, 21, 52], 0), ([40, 0, 20, 60], 1)]:
            row = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": 1}
            row |= {"iscrowd": 0, "ignore": ignore, "bbox": bbox, "vis_ratio": 1.0}
            content["annotations"].append(row)
    (folder / "annotations.json").write_text(json.dumps(content))


@pytest.fixture
def trainable(hkd_cfg, tmp_path):
    return with_pictures(hkd_cfg, tmp_path)


def with_pictures(cfg, tmp_path):
    if not (tmp_path / "data").exists():
        write_pictures(tmp_path / "data")
    name = f"resume_{tmp_path.name}"
    files = [str(tmp_path / "data/annotations.json"), str(tmp_path / "data/images")]
    cfg.HKD.DATA.REGISTER = [[name, "coco", *files]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    if cfg.HKD.STUDENT.META_ARCHITECTURE == "GeneralizedRCNN":
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "IgnoreAwareRPN"
        cfg.MODEL.ROI_HEADS.NAME = "IgnoreAwareROIHeads"
    cfg.INPUT.MIN_SIZE_TRAIN = (56, 64, 72)  # drawn for each image
    cfg.SOLVER.BASE_LR, cfg.HKD.SOLVER.OPTIMIZER = 1e-4, "adamw"
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 8, 2
    cfg.HKD.SOLVER.KEEP_CHECKPOINTS = 0
    cfg.HKD.HSAKD.TEACHER_ITERS = 6
    cfg.HKD.OSAKD.K = cfg.HKD.OSAKD.READY_AT = 8
    return cfg


def ends_alike(cfg, tmp_path, names=("model_0000001.pth", "model_0000005.pth")):
    whole = tmp_path / "whole"
    train(cfg, whole)
    for number, name in enumerate(names):
        part = resumed_copy(whole, tmp_path / f"part{number}", name)
        train(cfg, part, resume=True)
        assert same_end(whole, part) == [], name


@rule("A stopped run ends bit for bit where the uninterrupted one ends")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("term", ["hkd", "mgd", "osakd", "lwkd", "hsakd"])
def test_two_stage(term, workers, trainable, tmp_path):
    if term != "hkd":
        trainable.HKD.TERMS = [term]
    trainable.DATALOADER.NUM_WORKERS = workers
    ends_alike(trainable, tmp_path)


@rule("A stopped run ends bit for bit where the uninterrupted one ends")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("architecture", ["IgnoreAwareRetinaNet", "IgnoreAwareFCOS"])
def test_one_stage(architecture, workers, tmp_path):
    cfg = one_stage_config(architecture)
    files = save_teacher(one_stage_config(architecture, channels=32, width=0.5), tmp_path)
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = files
    cfg.HKD.TERMS = ["pyramid", "logit"]
    cfg.DATALOADER.NUM_WORKERS = workers
    ends_alike(with_pictures(cfg, tmp_path), tmp_path)


def test_without_groups_of_shapes_and_without_a_seed(trainable, tmp_path):
    trainable.DATALOADER.ASPECT_RATIO_GROUPING = False
    trainable.DATALOADER.NUM_WORKERS = 2
    trainable.HKD.TERMS = ["mgd"]
    trainable.SEED = -1  # the shuffle is drawn anew by every process, and goes on all the same
    ends_alike(trainable, tmp_path)


@rule("An evaluation changes nothing in the training")
def test_an_evaluation_changes_nothing(trainable, tmp_path):
    train(trainable, tmp_path / "plain")
    trainable.DATASETS.TEST = trainable.DATASETS.TRAIN
    trainable.TEST.EVAL_PERIOD = 2
    ends_alike(trainable, tmp_path)
    assert same_end(tmp_path / "plain", tmp_path / "whole") == []
