"""hkd export: a folder that can be given away, or one sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.config import get_cfg

import hkd_d2
from helpers.rules import rule
from helpers.small_detectors import save_teacher, small_config
from hkd_d2.cli.dispatch import run_command
from hkd_d2.config import add_hkd_config
from hkd_d2.export import formats, ship
from hkd_d2.modeling.checkpoint import StudentCheckpointer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a distilled run leaves: weights, config with the teacher's paths, metrics."""
    folder = tmp_path_factory.mktemp("run")
    cfg = small_config()
    config_file, weights = save_teacher(cfg, folder, "model_final")
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TERMS = ["pyramid", "logit"]
    cfg.HKD.LOGIT.WEIGHT = 2.5
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = "big.yaml", "/far/away/teacher/big.pth"
    cfg.DATASETS.TRAIN = ("my_train",)
    cfg.HKD.DATA.REGISTER = [["my_train", "citypersons", "/far/away/streets", "train"]]
    cfg.OUTPUT_DIR = "/far/away/out"
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "metrics.json").write_text(
        '{"iteration": 9, "total_loss": 1.0}\n'
        '{"iteration": 10, "miss_rate/Reasonable": 60.0}\n'
        '{"iteration": 20, "miss_rate/Reasonable": 47.123, "bbox/AP": 30.0, "total_loss": 0.5}\n'
    )
    return folder


def image():
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def shipped(run, tmp_path_factory):
    """A folder of the tool, fixed size and batch, which is quicker to write."""
    out = tmp_path_factory.mktemp("shipped") / "small"
    arguments = ["--model", str(run / "model_final.pth"), "--out", str(out)]
    arguments += ["--format", "onnx", "torchscript", "safetensors", "--size", "64x96"]
    arguments += ["--batch", "1", "--licence", "CC0", "--score-threshold", "0.2"]
    assert run_command("export", arguments) == 0
    return out


def test_what_is_in_the_folder(shipped, run):
    names = ["config.yaml", "model.onnx", "model.safetensors", "model.ts", "model_card.md"]
    assert sorted(p.name for p in shipped.iterdir()) == names
    wanted = hkd_d2.load_detector(run / "model_final.pth", score_threshold=0.2)
    for name in ("model.onnx", "model.safetensors"):
        exported = hkd_d2.load_detector(shipped / name)
        assert exported.class_names == ("pedestrian",)
        assert exported.metadata["weights_sha256"] == wanted.metadata["weights_sha256"]
        assert exported.metadata["score_threshold"] == 0.2
        found, expected = exported.detect([image()])[0], wanted.detect([image()])[0]
        assert len(found) == len(expected) > 5
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_the_card(shipped):
    card = (shipped / "model_card.md").read_text()
    for sentence in (
        "my_train",
        "terms pyramid (weight 0.5), logit (weight 2.5)",
        "Config `big.yaml`, weights `teacher/big.pth`",
        "after 20 iterations",
        "| MR^-2 Reasonable | 47.12 |",
        "drawn streets",
        "Weights: CC0",
        "| score threshold | 0.2 |",
    ):
        assert sentence in card, sentence
    assert "60.00" not in card


@rule("What is shipped has no teacher and no path of where it was trained")
def test_no_path_leaves_the_house(shipped):
    for name in ("config.yaml", "model_card.md"):
        assert "/far/away" not in (shipped / name).read_text()
    assert b"/far/away" not in (shipped / "model.onnx").read_bytes()


@rule("What is shipped has no teacher and no path of where it was trained")
def test_the_shipped_config_evaluates_the_safetensors(shipped):
    """As hkd train reads them, with every weight."""
    from detectron2.modeling import build_model

    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.merge_from_file(str(shipped / "config.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and cfg.HKD.TERMS == []
    model = build_model(cfg)
    path = str(shipped / "model.safetensors")
    StudentCheckpointer(model).load_complete(path, "config.yaml")
    for name, value in safetensors.torch.load_file(path).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def test_a_damaged_safetensors_file(shipped, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((shipped / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        hkd_d2.load_detector(path, config_file=shipped / "config.yaml")


@rule("An exported file finds what Detectron2 finds, or is not written")
def test_a_file_that_finds_something_else_is_not_written(run, tmp_path, monkeypatch):
    def broken(model, *arguments):
        with torch.no_grad():
            model.roi_heads.box_predictor.cls_score.bias[0] += 0.1
        return formats.export(model, *arguments)

    monkeypatch.setattr(ship, "export", broken)
    # The reference shares the model, so it is given a copy.
    monkeypatch.setattr(
        ship, "TorchDetector", lambda *a: hkd_d2.load_detector(run / "model_final.pth")
    )
    with pytest.raises(ValueError, match="Image 0: detection 0 "):
        ship.ship(run / "model_final.pth", None, tmp_path, ["torchscript"])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_an_earlier_one_whole(shipped, run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(shipped, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def no_operator(*arguments, **options):
        raise RuntimeError("no such operator")

    with pytest.raises(FileNotFoundError, match="no folder with images"):
        ship.ship(run / "model_final.pth", None, out, ["safetensors"], images=tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be written as torchscript"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.jit, "trace", no_operator)
            ship.ship(run / "model_final.pth", None, out, ["safetensors", "torchscript"])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_runs_folder_is_not_written(run, tmp_path):
    """With its marker or without one, as where a run's files were copied."""
    for number, names in enumerate([["config.yaml", "model_final.pth"], ["last_checkpoint"]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            shutil.copy(run / name, folder)
        (folder / "config.yaml").touch()
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        weights = (folder if "model_final.pth" in names else run) / "model_final.pth"
        with pytest.raises(ValueError, match="name another"):
            ship.ship(weights, None, folder, ["safetensors"])
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_verified_on_the_images_given(run, tmp_path):
    (tmp_path / "images").mkdir()
    for i, size in enumerate(((64, 96), (96, 64), (128, 192))):
        path = tmp_path / "images" / f"{i}.png"
        cv2.imwrite(str(path), np.zeros((*size, 3), np.uint8))
    weights = run / "model_final.pth"
    folder = tmp_path / "images"
    given = dict(forms=["torchscript"], images=folder)
    files = ship.ship(weights, None, tmp_path / "any", **given)
    assert files[0]["verified"]["images"] == 3 and files[0]["frames"] == "images given"
    files = ship.ship(weights, None, tmp_path / "fixed", **given, size=(64, 96))
    assert files[0]["verified"]["images"] == 2
    with pytest.raises(ValueError, match="proportions of 64x64"):
        ship.ship(weights, None, tmp_path / "square", **given, size=(64, 64))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--model", "none.pth"], "none"),
        (["--model", "RUN", "--batch", "0"], "The batch is 0"),
        (["--model", "RUN", "--size", "0x9"], "The size is 0x9"),
        (["--model", "RUN", "--classes", "a,b"], "1 classes and 2 are named"),
        (["--model", "RUN", "--images", "none"], "no folder with images"),
        (["--model", "RUN", "--score-threshold", "7"], "score_threshold is 7"),
    ],
)
def test_one_sentence(run, tmp_path, capsys, arguments, sentence):
    weights = str(run / "model_final.pth")
    arguments = [weights if a == "RUN" else a for a in arguments]
    assert run_command("export", [*arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("hkd export: ") and sentence in said


def test_the_words_of_the_tool(tmp_path):
    """tools/export.py takes --weights too."""
    command = [sys.executable, "tools/export.py", "--weights", str(tmp_path / "none.pth")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("export.py: "), done.stderr
    assert str(tmp_path) in done.stderr and done.stderr.count("\n") == 1
