"""Whole training runs on a few tiny pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.rules import rule
from helpers.small_detectors import small_config
from hkd_d2.engine import Trainer, preflight
from hkd_d2.modeling.checkpoint import StudentCheckpointer


def write_coco(folder, images=6, seed=0):
    """A data set of noise pictures with two people and an ignore region each, one of them empty."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "pedestrian"}]}
    for i in range(1, images + 1):
        name = f"{i:03}.png"
        pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        content["images"].append({"id": i, "file_name": name, "height": 64, "width": 96})
        if i == images:
            break  # the last picture has no boxes
        for bbox, ignore in [([8, 4, 21, 52], 0), ([50, 3, 22, 54], 0), ([76, 0, 20, 64], 1)]:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": i,
                    "category_id": 1,
                    "iscrowd": 0,
                    "ignore": ignore,
                    "bbox": bbox,
                    "vis_ratio": 1.0,
                }
            )
    (folder / "annotations.json").write_text(json.dumps(content))
    return str(folder / "annotations.json"), str(folder / "images")


@pytest.fixture
def trainable(hkd_cfg, tmp_path):
    """The distilling config with data, ready for Trainer."""
    return with_data(hkd_cfg, tmp_path)


def with_data(cfg, tmp_path):
    name = f"tiny_{tmp_path.name}"
    if not (tmp_path / "data").exists():
        write_coco(tmp_path / "data")
    files = [str(tmp_path / "data/annotations.json"), str(tmp_path / "data/images")]
    cfg.HKD.DATA.REGISTER = [[name, "coco", *files]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), (name,)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "IgnoreAwareRPN"
    cfg.MODEL.ROI_HEADS.NAME = "IgnoreAwareROIHeads"
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.SOLVER.BASE_LR = 1e-4
    return cfg


def run(cfg, resume=False):
    from detectron2.utils.env import seed_all_rng

    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer, trainer.train()


@rule("A student's checkpoint is a plain checkpoint, without teacher or terms")
def test_twenty_steps_evaluate_and_leave_a_students_checkpoint(trainable, tmp_path):
    trainable.HKD.EVALUATION.TEACHER = True
    trainable.SOLVER.CHECKPOINT_PERIOD = 1000
    from detectron2.utils.env import seed_all_rng

    seed_all_rng(0)
    trainable.freeze()  # as the command line does
    trainer = Trainer(trainable)
    before = {n: p.detach().clone() for n, p in trainer.model.terms.named_parameters()}
    assert any("adapters.p2.weight" in n for n in before)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    for name, parameter in trainer.model.terms.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} has not moved"
    assert set(results) == {"student", "teacher"}
    assert {"miss_rate", "bbox"} <= set(results["teacher"])

    lines = [json.loads(line) for line in open(f"{trainable.OUTPUT_DIR}/metrics.json")]
    logged = set().union(*lines)
    assert {"hkd/pyramid_raw", "hkd/region_weight", "loss_hkd_logit", "loss_cls"} <= logged

    # The plain student's config reads the file, completely.
    plain = Trainer.build_model(with_data(small_config(), tmp_path))
    StudentCheckpointer(plain).load_complete(
        f"{trainable.OUTPUT_DIR}/model_final.pth", "the plain student"
    )


def test_a_run_without_terms_cannot_be_resumed_with_them(trainable, tmp_path):
    trainable.SOLVER.MAX_ITER = 1
    trainable.DATASETS.TEST = ()
    plain = with_data(small_config(), tmp_path)
    plain.SOLVER.MAX_ITER, plain.DATASETS.TEST = 1, ()
    run(plain)
    with pytest.raises(ValueError, match="written by a run without distillation terms"):
        run(trainable, resume=True)


@rule("The checks before a run leave no trace in it")
def test_checks_leave_no_trace(trainable):
    from detectron2.modeling import build_model

    from hkd_d2.data.datasets import register_datasets

    register_datasets(trainable)
    trainable.MODEL.RESNETS.NORM = "BN"
    # mgd draws random numbers, reviewkd has running statistics.
    trainable.HKD.TERMS = ["pyramid", "region", "logit", "mgd", "reviewkd"]
    model = build_model(trainable)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    of_terms = {k: v.clone() for k, v in model.terms.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    losses = preflight.check_terms(model)
    assert set(losses) == set(trainable.HKD.TERMS) and min(losses.values()) > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, of_terms[k]) for k, v in model.terms.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert all(p.grad is None for p in model.parameters())


@rule("What cannot work stops the run before its first step, with one sentence")
def test_a_dead_term_stops_the_run(trainable):
    model = Trainer.build_model(trainable)
    for parameter in model.student.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="The term 'pyramid' gives the student no gradient"):
        preflight.check_terms(model)
    model = Trainer.build_model(trainable)
    model.terms["region"].forward = lambda s, t, targets: s.regions.pooled.sum() * float("nan")
    with pytest.raises(ValueError, match="The term 'region' is nan before the first step"):
        preflight.check_terms(model)


@rule("What cannot work stops the run before its first step, with one sentence")
def test_ignore_rows_need_heads_that_know_them(trainable):
    trainable.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    with pytest.raises(ValueError, match="5 boxes to be ignored.*IgnoreAwareROIHeads"):
        Trainer(trainable)


@rule("What cannot work stops the run before its first step, with one sentence")
def test_more_classes_than_the_heads_have(trainable, tmp_path):
    file = tmp_path / "data/annotations.json"
    content = json.loads(file.read_text())
    content["categories"].append({"id": 2, "name": "car"})
    content["annotations"][0]["category_id"] = 2
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has 2 classes and MODEL.ROI_HEADS.NUM_CLASSES is 1"):
        Trainer(trainable)


@rule("What cannot work stops the run before its first step, with one sentence")
@pytest.mark.parametrize("harm", ["cut", "corrupt", "text", "missing", "size"])
def test_broken_images_stop_the_run_before_the_first_step(trainable, tmp_path, harm):
    image = tmp_path / "data/images/002.png"
    if harm == "cut":
        image.write_bytes(image.read_bytes()[:-200])
        sentence = "002.png' cannot be read"
    elif harm == "corrupt":
        content = bytearray(image.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
        image.write_bytes(content)
        sentence = "002.png' cannot be read"
    elif harm == "text":
        image.write_text("not a picture")
        sentence = "002.png' cannot be read"
    elif harm == "missing":
        image.unlink()
        sentence = "002.png"
    else:
        Image.new("RGB", (90, 64)).save(image)
        sentence = "002.png' is 90x64 pixels and its annotation says 96x64"
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        Trainer(trainable)


def test_no_training_set(trainable):
    trainable.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        Trainer(trainable)
    trainable.DATASETS.TRAIN = ("nowhere",)
    with pytest.raises(ValueError, match="'nowhere' is not registered"):
        Trainer(trainable)


def test_schedules_follow_the_number_of_processes(trainable):
    """SOLVER.REFERENCE_WORLD_SIZE 1 on two processes halves what is counted in iterations."""
    trainable.SOLVER.REFERENCE_WORLD_SIZE, trainable.SOLVER.MAX_ITER = 1, 20
    trainable.HKD.HSAKD.TEACHER_ITERS = 6
    schedule = trainable.HKD.PYRAMID.SCHEDULE
    schedule.STOP_ITER, schedule.WARMUP_ITERS = 12, 1
    trainable.freeze()
    scaled = Trainer.auto_scale_workers(trainable, 2)
    assert scaled.SOLVER.MAX_ITER == 10 and scaled.HKD.HSAKD.TEACHER_ITERS == 3
    assert scaled.HKD.PYRAMID.SCHEDULE.STOP_ITER == 6
    assert scaled.HKD.PYRAMID.SCHEDULE.WARMUP_ITERS == 1  # 0 would be none
    assert scaled.HKD.REGION.SCHEDULE.STOP_ITER == 0 and scaled.is_frozen()
    assert schedule.STOP_ITER == 12 and Trainer.auto_scale_workers(scaled, 2) is scaled
