"""Loading a teacher: what is wrong is said in one sentence before anything is trained."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torchvision.ops import roi_align

from helpers.rules import rule
from helpers.small_detectors import save_teacher, small_config
from hkd_d2.distillation.detector_pass import DetectorPass
from hkd_d2.distillation.term import POOLED
from hkd_d2.modeling.checkpoint import StudentCheckpointer


@pytest.mark.parametrize(
    "key, value, error, sentence",
    [
        ("CONFIG_FILE", "", FileNotFoundError, "HKD.TEACHER.CONFIG_FILE is empty"),
        ("CONFIG_FILE", "no.yaml", FileNotFoundError, "'no.yaml' is neither in"),
        ("WEIGHTS", "", FileNotFoundError, "HKD.TEACHER.WEIGHTS is empty"),
        ("WEIGHTS", "no.pth", FileNotFoundError, "'no.pth' does not exist"),
        ("PRECISION", "int8", ValueError, "HKD.TEACHER.PRECISION is 'int8'"),
    ],
)
def test_wrong_keys(hkd_cfg, key, value, error, sentence):
    hkd_cfg.HKD.TEACHER[key] = value
    with pytest.raises(error, match=sentence):
        build_model(hkd_cfg)


@rule("The teacher's weights are complete or refused")
def test_weights_of_another_architecture(hkd_cfg, tmp_path):
    def refused(state, sentence):
        torch.save({"model": state}, tmp_path / "other.pth")
        hkd_cfg.HKD.TEACHER.WEIGHTS = str(tmp_path / "other.pth")
        with pytest.raises(ValueError, match=sentence):
            build_model(hkd_cfg)

    good = torch.load(hkd_cfg.HKD.TEACHER.WEIGHTS, weights_only=True)["model"]
    refused(
        {k: v for k, v in good.items() if "cls_score" not in k},
        r"2 keys of the model are missing, 'roi_heads.box_predictor.cls_score.weight'",
    )
    refused(
        build_model(small_config()).state_dict(), r"has shape .* in the file and .* in the model"
    )


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(path):
        raise OSError("no network")

    checkpointer = StudentCheckpointer(torch.nn.Linear(2, 2))
    monkeypatch.setattr(checkpointer.path_manager, "get_local_path", offline)
    with pytest.raises(FileNotFoundError, match="'detectron2://x.pkl' could not be fetched"):
        checkpointer.load("detectron2://x.pkl")


def test_files_that_are_no_checkpoints(tmp_path):
    model = torch.nn.Linear(2, 2)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").write_text("")
    for name in ("text.pth", "empty.pth"):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            StudentCheckpointer(model).load(str(tmp_path / name))


class _Harmful:
    def __reduce__(self):
        return print, ("code ran",)


@rule("No code runs from a checkpoint")
def test_no_code_runs_from_a_file(tmp_path, capsys):
    model = torch.nn.Linear(2, 2)
    for name, save in [("x.pth", torch.save), ("x.pkl", lambda o, f: pickle.dump(o, f.open("wb")))]:
        save({"model": {}, "x": _Harmful()}, tmp_path / name)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            StudentCheckpointer(model).load(str(tmp_path / name))
    assert "code ran" not in capsys.readouterr().out


def test_model_zoo_pickles_load(tmp_path):
    weight = np.arange(4, dtype=np.float32).reshape(2, 2)
    bias = np.float32([5, 6])
    content = {"model": {"weight": weight, "bias": bias}, "__author__": "somebody"}
    for protocol in (2, 4):
        with (tmp_path / "zoo.pkl").open("wb") as f:
            pickle.dump(content, f, protocol=protocol)
        model = torch.nn.Linear(2, 2)
        StudentCheckpointer(model).load(str(tmp_path / "zoo.pkl"))
        assert model.weight.tolist() == [[0, 1], [2, 3]] and model.bias.tolist() == [5, 6]


def test_weights_of_a_deeper_body(hkd_cfg, tmp_path):
    cfg = small_config(channels=32, hidden=40, width=0.5)
    cfg.HKD.BACKBONE.BLOCKS = [1, 2, 1, 1]
    hkd_cfg.HKD.TEACHER.WEIGHTS = save_teacher(cfg, tmp_path)[1]
    with pytest.raises(ValueError, match=r"the model has no 'backbone.bottom_up.res3.1"):
        build_model(hkd_cfg)


@rule("The teacher runs in its own precision, its boxes in float32 with either pooler")
@pytest.mark.parametrize("fused_pooler", [True, False])
def test_boxes_are_not_rounded_to_the_precision_of_the_teacher(hkd_cfg, build, fused_pooler):
    hkd_cfg.HKD.TEACHER.PRECISION = "bf16"
    teacher = build(hkd_cfg).teacher
    # A ramp: the value of a cell is its column, counted from the box, where bfloat16 is fine
    # enough. Wide boxes far right, where it is not: it knows 1800 and 1808.
    columns = (torch.arange(512) - 455).to(torch.bfloat16).expand(1, 32, 16, 512)
    maps = {n: columns[..., :: 2**i, :: 2**i] for i, n in enumerate(["p2", "p3", "p4", "p5", "p6"])}
    boxes = [Boxes(torch.tensor([[1803.0, 8.0, 1843.0, 48.0]]))]
    found = DetectorPass(images=None, features=maps)
    teacher.advance(found, boxes, frozenset({POOLED}), fused_pooler)
    cells = maps["p2"].float()
    expected = roi_align(
        cells, [boxes[0].tensor], 3, spatial_scale=0.25, sampling_ratio=0, aligned=True
    )
    assert torch.allclose(found.regions.pooled.float(), expected, atol=0.02)


@rule("The teacher runs in its own precision, its boxes in float32 with either pooler")
@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_is_the_teachers_own(hkd_cfg, build, precision, dtype):
    from helpers.small_detectors import make_batch

    hkd_cfg.HKD.TEACHER.PRECISION = precision
    teacher = build(hkd_cfg).teacher
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the student's autocast does not reach it
        found = teacher.features(make_batch(), (64, 96))
    assert {v.dtype for v in found.features.values()} == {dtype}


@rule("The teacher sees its own normalisation and channel order, padded as the student")
def test_students_padding_has_to_serve_the_teacher(hkd_cfg, build):
    model = build(hkd_cfg)
    from hkd_d2.modeling.meta_arch import HKDDetector

    model.student.backbone._size_divisibility = 16
    with pytest.raises(ValueError, match="padded to a multiple of 32 and the student pads to 16"):
        HKDDetector(student=model.student, teacher=model.teacher, terms=model.terms)
