"""Presets of published methods: their HKD node trains small detectors, and what it says by hand."""

import pytest
import torch
from detectron2.config import get_cfg

from helpers.rules import rule
from helpers.small_detectors import (
    METHODS,
    make_batch,
    one_stage_config,
    preset,
    save_teacher,
    small_config,
    use_preset,
)
from helpers.training_steps import steps
from hkd_d2.config import add_hkd_config
from hkd_d2.engine import preflight


def on_small_detectors(name, teacher_files, cfg=None):
    """The preset's HKD node on a small student and its teacher."""
    cfg = use_preset(cfg or small_config(), name)
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = teacher_files
    return cfg


def check_trains(model, terms, batches):
    """A few steps: each term finite and above 0, and felt by the student."""
    raw = preflight.check_terms(model)
    assert list(raw) == terms and min(raw.values()) > 0
    record, _ = steps(model, batches)
    for losses, grads, _ in record:
        assert all(torch.isfinite(x).all() for x in [*losses.values(), *grads.values()])
        assert {f"loss_hkd_{name}" for name in terms} <= set(losses)
        assert all(losses[f"loss_hkd_{name}"] > 0 for name in terms)
    for name, parameter in model.terms.named_parameters():
        assert parameter.grad is not None, name


@rule("A method's preset trains small detectors")
@pytest.mark.parametrize(
    "name, terms",
    [
        ("mimic", ["region"]),
        ("defeat", ["pyramid", "logit"]),
        ("dkd", ["logit"]),
        ("chen2017", ["pyramid", "logit"]),
    ],
)
def test_two_stage_presets_train(name, terms, teacher_files, build):
    model = build(on_small_detectors(name, teacher_files))
    check_trains(model, terms, [make_batch(seed=s) for s in range(3)])


@rule("A method's preset trains small detectors")
@pytest.mark.parametrize("convs", [1, 2])
def test_crosskd_trains(convs, tmp_path, build):
    configs = [one_stage_config("RetinaNet", *size) for size in ((16, 0.25), (32, 0.5))]
    for cfg in configs:
        cfg.MODEL.RETINANET.NUM_CONVS = convs
    cfg = on_small_detectors("crosskd", save_teacher(configs[1], tmp_path), configs[0])
    check_trains(build(cfg), ["crosskd"], [make_batch(True, seed=s) for s in range(3)])


@rule("HKD.STUDENT.LOSS_WEIGHTS scales the losses that it names and no other")
def test_chen_scales_the_students_hard_losses(teacher_files, build):
    """mu halves the two classifiers' hard losses and nothing else."""
    cfg = on_small_detectors("chen2017", teacher_files)
    cfg.HKD.POOLER, cfg.HKD.CHANNELS_LAST = "torchvision", False
    (losses, _, _), *_ = steps(build(cfg), [make_batch()])[0]
    (plain, _, _), *_ = steps(build(small_config()), [make_batch()])[0]
    for name, loss in plain.items():
        factor = 0.5 if name in ("loss_cls", "loss_rpn_cls") else 1.0
        assert torch.equal(losses[name], factor * loss), name
    assert set(losses) - set(plain) == {"loss_hkd_pyramid", "loss_hkd_logit"}


def test_a_loss_that_the_student_lacks_stops_before_step_1(teacher_files, build):
    cfg = on_small_detectors("chen2017", teacher_files)
    cfg.HKD.STUDENT.LOSS_WEIGHTS["loss_clas"] = 0.5
    model = build(cfg)
    with pytest.raises(ValueError, match="names 'loss_clas', which is not .* choose from loss_cls"):
        preflight.check_terms(model)


@pytest.mark.parametrize(
    "name, student",
    [
        *((n, "student_citypersons") for n in ("mimic", "defeat", "dkd", "chen2017")),
        ("crosskd", "student_retinanet_citypersons"),
    ],
)
def test_presets_train_the_students_own_config(name, student):
    distilled, alone = preset(name), get_cfg()
    add_hkd_config(alone)
    alone.merge_from_file(str(METHODS.parent / f"{student}.yaml"))
    assert distilled.MODEL.META_ARCHITECTURE == "HKDDetector"
    distilled.MODEL.META_ARCHITECTURE = distilled.HKD.STUDENT.META_ARCHITECTURE
    distilled.SOLVER.CLIP_GRADIENTS = alone.SOLVER.CLIP_GRADIENTS  # published with some methods
    assert distilled.MODEL == alone.MODEL and distilled.SOLVER == alone.SOLVER
    assert distilled.INPUT == alone.INPUT and distilled.HKD.BACKBONE == alone.HKD.BACKBONE


@rule("A published method has its own normaliser and weight, by hand")
def test_published_weights():
    """What each publication says, and what it does not, stands in the comment of its file."""
    mimic = preset("mimic").HKD.REGION
    assert (mimic.WEIGHT, mimic.BOXES, mimic.REDUCTION) == (1.0, "teacher", "half_mean")
    weights = {}
    for name in ("defeat", "dkd", "chen2017"):
        node = preset(name).HKD.LOGIT
        assert (node.WEIGHT, node.TEMPERATURE) == (1.0, 1.0)
        weights[name] = dict(zip(node.PARTS, node.PART_WEIGHTS, strict=True))
    assert weights == {
        "defeat": {"kl_foreground": 2.0, "kl_background": 2.0},
        "dkd": {"tckd": 1.0, "nckd": 0.25},
        "chen2017": dict.fromkeys(
            ("cross_entropy", "bounded", "rpn_cross_entropy", "rpn_bounded"), 0.5
        ),
    }
    cross = preset("crosskd").HKD.CROSSKD
    assert (cross.WEIGHT, cross.CLASS_WEIGHT, cross.BOX_WEIGHT, cross.BETA) == (1.0,) * 4
    assert (cross.REUSED_CONVS, cross.BOX_LOSS) == (1, "giou")
    chen = preset("chen2017").HKD
    assert (chen.LOGIT.BACKGROUND_WEIGHT, chen.LOGIT.BOUND_MARGIN) == (1.5, 0.01)
    assert (chen.PYRAMID.WEIGHT, chen.PYRAMID.ADAPTER) == (0.5, "always")
