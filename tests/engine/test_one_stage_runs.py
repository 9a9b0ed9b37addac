"""One-stage and cascade runs by the trainer: the repository's configs in small, the checks."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from helpers.rules import rule
from helpers.small_detectors import one_stage_config, save_teacher
from hkd_d2.config import add_hkd_config
from hkd_d2.data.datasets import check_records, register_datasets
from hkd_d2.data.pseudo_labels import write_pseudo_labels
from hkd_d2.data.streets import generate_streets
from hkd_d2.engine import Trainer, preflight
from hkd_d2.engine.pseudo_labels import label_images
from hkd_d2.modeling.checkpoint import StudentCheckpointer

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Six drawn streets, two of them for evaluation."""
    root = tmp_path_factory.mktemp("streets") / "data"
    generate_streets(root, num_train=4, num_val=2, height=96, width=160, seed=1, workers=1)
    return root


def in_small(name, streets, folder, *opts):
    """A config of the repository on drawn streets, without a network, for two steps on a CPU."""
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    sets = [[f"streets_{streets.parent.name}_{s}", "citypersons", str(streets), s]
            for s in ("train", "val")]  # fmt: skip
    cfg.HKD.DATA.REGISTER = sets
    cfg.HKD.DATA.MIN_HEIGHT = 20
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ((s[0],) for s in sets)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 160
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 160
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.HKD.BACKBONE.PRETRAINED = "cpu", "", False
    cfg.MODEL.RESNETS.NORM = "BN"  # two pictures on one process, from scratch
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 2, ()
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 100, 0
    cfg.OUTPUT_DIR = str(folder)
    cfg.merge_from_list(list(opts))
    return cfg


def train(cfg):
    torch.manual_seed(0)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer.train()


@rule("Every one-stage config trains, and the plain config reads the result")
@pytest.mark.parametrize(
    "kind, presets",
    [
        ("cascade", ["hkd_citypersons.yaml", "methods/chen2017.yaml"]),
        (
            "retinanet",
            ["hkd_retinanet_citypersons.yaml", "methods/adl.yaml", "methods/crosskd.yaml"],
        ),
        ("fcos", ["hkd_fcos_citypersons.yaml"]),
    ],
)
def test_every_config_trains(streets, tmp_path, kind, presets):
    results = train(in_small(f"teacher_{kind}_citypersons.yaml", streets, tmp_path / "teacher"))
    assert {"miss_rate", "bbox"} <= set(results)
    weights = str(tmp_path / "teacher" / "model_final.pth")
    student = "student" if kind == "cascade" else f"student_{kind}"
    plain_cfg = in_small(f"{student}_citypersons.yaml", streets, tmp_path / "student")
    train(plain_cfg)
    teacher_config = tmp_path / "teacher.yaml"
    teacher_cfg = in_small(f"teacher_{kind}_citypersons.yaml", streets, tmp_path / "teacher")
    teacher_config.write_text(teacher_cfg.dump())
    for preset in presets:
        folder = tmp_path / Path(preset).stem
        teacher = ["HKD.TEACHER.CONFIG_FILE", str(teacher_config), "HKD.TEACHER.WEIGHTS", weights]
        cfg = in_small(preset, streets, folder, *teacher, "HKD.EVALUATION.TEACHER", True)
        results = train(cfg)
        assert set(results) == {"student", "teacher"}
        logged = set().union(*(json.loads(x) for x in (folder / "metrics.json").open()))
        assert {f"loss_hkd_{name}" for name in cfg.HKD.TERMS} <= logged
        # The plain student's config reads the file, completely.
        plain = build_model(plain_cfg)
        StudentCheckpointer(plain).load_complete(str(folder / "model_final.pth"), "the student")


def test_the_presets_of_sad_train(streets, tmp_path):
    teacher_cfg = in_small("teacher_retinanet_citypersons.yaml", streets, tmp_path)
    config_file, weights = save_teacher(teacher_cfg, tmp_path)
    register_datasets(teacher_cfg)
    records = check_records(teacher_cfg.DATASETS.TRAIN[0])
    pseudo = str(tmp_path / "file.json")
    write_pseudo_labels(pseudo, label_images(teacher_cfg, weights, records, score_threshold=0.5))
    teacher = ["HKD.TEACHER.CONFIG_FILE", config_file, "HKD.TEACHER.WEIGHTS", weights]
    for name, added in (
        ("sad_supervised", []),
        ("sad_hard", ["HKD.DATA.PSEUDO", [pseudo]]),
        ("sad", ["HKD.DATA.PSEUDO", [pseudo], *teacher]),
    ):
        folder = tmp_path / name
        share = ["HKD.DATA.LABELED_SHARE", 0.25]  # one of the four images
        cfg = in_small(f"methods/{name}.yaml", streets, folder, *share, *added)
        assert {"miss_rate", "bbox"} <= set(train(cfg))
        logged = set().union(*(json.loads(x) for x in (folder / "metrics.json").open()))
        assert ("loss_hkd_adl" in logged) == (name == "sad")


@pytest.mark.parametrize("architecture", ["RetinaNet", "FCOS"])
def test_ignore_rows_need_a_detector_that_knows_them(streets, tmp_path, architecture):
    cfg = in_small("student_retinanet_citypersons.yaml", streets, tmp_path)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.HKD.DATA.MIN_HEIGHT = 60
    with pytest.raises(ValueError, match="boxes to be ignored.*to IgnoreAwareRetinaNet or Ignore"):
        Trainer(cfg)


def test_more_classes_than_the_head_has():
    model = build_model(one_stage_config("RetinaNet"))
    row = {"bbox": [0, 0, 30, 80], "bbox_mode": 1, "category_id": 2, "iscrowd": 0}
    data = {"tiny": [{"annotations": [{**row, "ignore": 0, "vis_ratio": 1.0}]}]}
    with pytest.raises(ValueError, match="has 3 classes and MODEL.RETINANET.NUM_CLASSES is 1"):
        preflight.check_labels(one_stage_config("RetinaNet"), model, data)


@rule("The checks before a run leave no trace in it")
@pytest.mark.parametrize("architecture", ["RetinaNet", "FCOS", "IgnoreAwareFCOS"])
def test_checks_leave_no_trace(tmp_path, architecture):
    cfg = one_stage_config(architecture)
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = save_teacher(cfg, tmp_path)
    cfg.MODEL.META_ARCHITECTURE, cfg.HKD.TERMS = (
        "HKDDetector",
        ["pyramid", "region", "logit", "adl", "crosskd"],
    )
    model = build_model(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    losses = preflight.check_terms(model)
    assert set(losses) == set(cfg.HKD.TERMS) and min(losses.values()) > 0
    assert not hasattr(model.student, "loss_normalizer")
    model.student.loss_normalizer = 7.0  # a resumed run's
    preflight.check_terms(model)
    assert model.student.loss_normalizer == 7.0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
