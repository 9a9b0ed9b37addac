"""hkd detect."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.red_detector import street
from helpers.rules import rule
from helpers.small_detectors import one_stage_config, save_teacher, small_config
from hkd_d2.cli.dispatch import run_command
from hkd_d2.export.formats import Shape, export
from hkd_d2.inference.torch_backend import build_detector

pytestmark = rule("The demo goes on past what it cannot read, says so, and replaces no input")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def main():
    return partial(run_command, "detect")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Teacher with config.yaml beside it; student whose config has another name."""
    folder = tmp_path_factory.mktemp("models")
    config, weights = save_teacher(small_config(), folder, "teacher")
    Path(config).rename(folder / "config.yaml")
    (folder / "student").mkdir()
    return weights, save_teacher(one_stage_config("FCOS"), folder / "student", "student")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("streets").mkdir()
    for name in ("a", "b"):
        Image.fromarray(street()).save(f"streets/{name}.png")
    Path("streets/broken.png").write_bytes(b"no picture")


def test_teacher_and_student_side_by_side_and_what_is_refused(main, models, capsys):
    teacher, (config, student) = models
    arguments = ["--model", f"big={teacher}", "--model", student]
    arguments += ["--config-file", f"student={config}", "--threshold", "0"]
    assert main([*arguments, "streets", "nowhere.png"]) == 1
    said = capsys.readouterr()
    assert "2 frames; 2 annotated copies and 2 COCO files in output/demo" in said.out
    assert "'nowhere.png' does not exist" in said.err
    assert "'streets/broken.png' cannot be read" in said.err
    assert said.err.endswith("2 of the inputs were refused; the sentences above say why\n")
    assert Image.open("output/demo/streets/b.png").width > 2 * 128
    for name in ("big", "student"):
        content = json.loads(Path(f"output/demo/detections_{name}.json").read_text())
        assert len(content["images"]) == 2 and len(content["annotations"]) > 5


def test_all_well(main, models, capsys):
    assert main(["--model", models[0], "streets/a.png", "--out", "new/place"]) == 0
    assert "refused" not in capsys.readouterr().err
    assert np.asarray(Image.open("new/place/a.png")).shape == (96, 128, 3)


def test_a_picture_too_narrow_for_the_detector_is_left_out(main, models, capsys):
    Path("streets/broken.png").unlink()
    Image.new("RGB", (9000, 1)).save("streets/aa.png")
    assert main(["--model", models[0], "streets"]) == 1
    said = capsys.readouterr().err
    assert "'streets/aa.png' is left out: An image of 9000x1 pixels is too narrow" in said
    assert sorted(p.name for p in Path("output/demo/streets").iterdir()) == ["a.png", "b.png"]
    assert len(json.loads(Path("output/demo/detections.json").read_text())["images"]) == 2


def test_a_program_that_is_named_is_run(main, models):
    model, metadata = build_detector(models[0])
    export(model, metadata, Path("model.ts"), "torchscript", Shape((96, 128)))
    assert main(["--model", models[0], "--model", "model.ts", "streets/a.png"]) == 0
    found = [
        json.loads(Path(f"output/demo/detections_{name}.json").read_text())["annotations"]
        for name in ("teacher", "model")
    ]
    assert len(found[0]) > 5 and len(found[1]) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere.pth"], "'nowhere.pth' does not exist"),
        (["--model", "{teacher}", "--threshold", "2"], "--threshold is 2.0; give a number"),
        (["--model", "{teacher}", "--max-frames", "0"], "--max-frames is 0; give 1 or more"),
        (["--model", "{teacher}", "--model", "{teacher}"], "Two models are named 'teacher'"),
        (["--model", "={teacher}"], "give a model as NAME=FILE"),
        (["--model", "a/b={teacher}"], "a name without '/'"),
        (["--model", "{teacher}", "--config-file", "x=c.yaml"], "the name of a model: teacher"),
        (["--model", "{student}"], "config.yaml' does not exist; give config_file"),
        (["--model", "{teacher}", "--out", "streets"], "would replace it"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_code_2(main, models, capsys, arguments, message):
    files = {"teacher": models[0], "student": models[1][1]}
    assert main([*(text.format(**files) for text in arguments), "streets/a.png"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hkd detect: ") and said.count("\n") == 1
    assert message in said
    assert not Path("output").exists()


def test_readers_comment_on_nothing_themselves(models):
    """Of a video that FFmpeg cannot read, one sentence reaches the user."""
    Path("text.mp4").write_bytes(b"no video" * 99)
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--model", models[0], "text.mp4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "frame/s" not in line]
    assert len(lines) == 2 and "'text.mp4' cannot be read" in lines[0], done.stderr
