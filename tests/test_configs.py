"""Every config file merges and stays thin; the students are as small as promised."""

import itertools
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from helpers.rules import rule
from hkd_d2.config import add_hkd_config
from hkd_d2.distillation.spec import check_same_anchors
from hkd_d2.modeling.families import detector_spec
from hkd_d2.modeling.summary import count_parameters
from hkd_d2.modeling.teacher import load_teacher_config

CONFIGS = Path(__file__).parents[1] / "configs"


def load(path, *opts):
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.merge_from_list(list(opts))
    return cfg


def build(name):
    cfg = load(CONFIGS / name, "MODEL.DEVICE", "cpu", "HKD.BACKBONE.PRETRAINED", False)
    return build_model(cfg)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_config_merges_and_is_thin(path):
    cfg = load(path)
    assert len(path.read_text().splitlines()) < 25
    if cfg.HKD.TEACHER.CONFIG_FILE:
        load_teacher_config(cfg.HKD.TEACHER.CONFIG_FILE)  # raises where there is no such file
    if cfg.MODEL.META_ARCHITECTURE == "HKDDetector":
        assert cfg.HKD.TERMS


@pytest.fixture(scope="module")
def teacher():
    return build("teacher_citypersons.yaml")


@rule("A student is at least six times smaller than its teacher")
@pytest.mark.parametrize("name", ["student_citypersons", "student_mobilenetv3_citypersons"])
def test_students_are_six_times_smaller(teacher, name):
    heavy = sum(p.numel() for p in teacher.parameters())
    small = sum(p.numel() for p in build(f"{name}.yaml").parameters())
    assert heavy / small >= 6.0
    assert count_parameters(teacher)["total"] == heavy


def test_teacher_and_student_match_by_stride(teacher):
    student = build("student_citypersons.yaml")
    for name, spec in teacher.backbone.output_shape().items():
        assert student.backbone.output_shape()[name].stride == spec.stride
    assert student.proposal_generator.anchor_generator.num_anchors == [3] * 5
    assert teacher.proposal_generator.anchor_generator.num_anchors == [3] * 5


def test_anchors_have_pedestrian_heights(teacher):
    cells = teacher.proposal_generator.anchor_generator.cell_anchors
    heights = [anchor[3].item() - anchor[1].item() for level in cells for anchor in level]
    widths = [anchor[2].item() - anchor[0].item() for level in cells for anchor in level]
    assert heights[0] == pytest.approx(50, abs=0.05)
    assert max(heights) > 1024 / 1.26  # the tallest reach the image's height within one step
    assert all(h / w == pytest.approx(2.44, rel=1e-5) for h, w in zip(heights, widths, strict=True))
    # A third of an octave from one to the next, over all levels.
    steps = [b / a for a, b in itertools.pairwise(heights)]
    assert steps == pytest.approx([2 ** (1 / 3)] * 14, rel=5e-3)


@rule("A student is at least six times smaller than its teacher")
@pytest.mark.parametrize("kind, anchors", [("retinanet", 3), ("fcos", 1)])
def test_one_stage_pairs(kind, anchors):
    """Six times smaller, and anchor by anchor comparable."""
    heavy, small = (build(f"{role}_{kind}_citypersons.yaml") for role in ("teacher", "student"))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (heavy, small)]
    assert sizes[0] / sizes[1] >= 6.0
    ours, theirs = detector_spec(small), detector_spec(heavy)
    check_same_anchors("adl", ours.dense, theirs.dense)
    assert [len(a) for a in ours.dense.cell_anchors] == [anchors] * 5
    assert [s.stride for s in ours.levels.values()] == [8, 16, 32, 64, 128]
    alone = load(CONFIGS / f"student_{kind}_citypersons.yaml")
    distilled = load(CONFIGS / f"hkd_{kind}_citypersons.yaml")
    distilled.MODEL.META_ARCHITECTURE = distilled.HKD.STUDENT.META_ARCHITECTURE
    assert distilled.MODEL == alone.MODEL and distilled.SOLVER == alone.SOLVER


@pytest.mark.parametrize("student", ["", "mobilenetv3_"])
def test_distillation_changes_nothing_but_the_architecture(student):
    """The student's own config builds what distillation trains."""
    alone = load(CONFIGS / f"student_{student}citypersons.yaml")
    distilled = load(CONFIGS / f"hkd_{student}citypersons.yaml")
    assert distilled.MODEL.META_ARCHITECTURE == "HKDDetector"
    assert list(distilled.HKD.TERMS) == ["pyramid", "region", "logit"]
    weights = [distilled.HKD[name].WEIGHT for name in ("PYRAMID", "REGION", "LOGIT")]
    assert weights == [0.5, 30.0, 30.0]
    distilled.MODEL.META_ARCHITECTURE = distilled.HKD.STUDENT.META_ARCHITECTURE
    assert distilled.MODEL == alone.MODEL
    assert distilled.SOLVER == alone.SOLVER and distilled.INPUT == alone.INPUT
    assert distilled.HKD.BACKBONE == alone.HKD.BACKBONE


def test_the_three_rows_of_sad_differ_in_what_they_compare():
    alone, hard, soft = (
        load(CONFIGS / "methods" / f"{name}.yaml") for name in ("sad_supervised", "sad_hard", "sad")
    )
    assert alone.HKD.DATA.LABELED_SHARE == 0.1 and not alone.HKD.DATA.PSEUDO
    assert hard.HKD.DATA == soft.HKD.DATA and hard.HKD.DATA.PSEUDO
    assert hard.HKD.DATA.LABELED_SHARE == 0.1 and hard.HKD.DATA.PSEUDO_RATIO == 1.0
    assert not alone.HKD.TERMS and not hard.HKD.TERMS and list(soft.HKD.TERMS) == ["adl"]
    soft.MODEL.META_ARCHITECTURE = soft.HKD.STUDENT.META_ARCHITECTURE
    assert alone.MODEL == hard.MODEL == soft.MODEL
    assert alone.SOLVER == hard.SOLVER == soft.SOLVER


# Terms and weights as published; what else a preset may change is the clipping of gradients.
FEATURE_PRESETS = {
    "fgfi": ("pyramid", {"WEIGHT": 0.01}),
    "defeat": ("pyramid", {"WEIGHT": 1.0, "FOREGROUND_WEIGHT": 3.0, "BACKGROUND_WEIGHT": 12.0}),
    "pkd": ("pyramid", {"WEIGHT": 6.0}),
    "cwd": ("pyramid", {"WEIGHT": 10.0}),
    "fgd": (
        "fgd",
        {
            "WEIGHT": 1.0,
            "FOREGROUND_WEIGHT": 5e-5,
            "BACKGROUND_WEIGHT": 2.5e-5,
            "ATTENTION_WEIGHT": 5e-5,
            "RELATION_WEIGHT": 5e-7,
        },
    ),
    "mgd": ("mgd", {"WEIGHT": 5e-7, "MASK_RATIO": 0.45}),
    "reviewkd": ("reviewkd", {"WEIGHT": 1.2}),
}


def test_presets_of_hsakd_differ_in_how_the_heads_learn():
    offline, online = (load(CONFIGS / "methods" / f"{name}.yaml") for name in ("hsakd", "hssakd"))
    alone = load(CONFIGS / "student_citypersons.yaml")
    for preset in (offline, online):
        assert list(preset.HKD.TERMS) == ["hsakd", "logit"]
        assert (preset.HKD.HSAKD.WEIGHT, preset.HKD.HSAKD.TEMPERATURE) == (1.0, 3.0)
        preset.MODEL.META_ARCHITECTURE = preset.HKD.STUDENT.META_ARCHITECTURE
        assert preset.MODEL == alone.MODEL and preset.SOLVER == alone.SOLVER
    assert (offline.HKD.HSAKD.MUTUAL, online.HKD.HSAKD.MUTUAL) == (False, True)
    online.HKD.HSAKD.MUTUAL = False
    assert online.HKD == offline.HKD


@rule("A method's preset trains small detectors")
@pytest.mark.parametrize("method", FEATURE_PRESETS)
def test_presets_of_feature_methods(method):
    alone = load(CONFIGS / "student_citypersons.yaml")
    preset = load(CONFIGS / "methods" / f"{method}.yaml")
    term, weights = FEATURE_PRESETS[method]
    assert term in preset.HKD.TERMS
    assert {key: preset.HKD[term.upper()][key] for key in weights} == weights
    assert preset.OUTPUT_DIR == f"output/{method}_citypersons"
    preset.MODEL.META_ARCHITECTURE = preset.HKD.STUDENT.META_ARCHITECTURE
    preset.SOLVER.CLIP_GRADIENTS = alone.SOLVER.CLIP_GRADIENTS
    assert preset.MODEL == alone.MODEL
    assert preset.SOLVER == alone.SOLVER and preset.INPUT == alone.INPUT
