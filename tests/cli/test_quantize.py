"""hkd quantize."""

from functools import partial
from pathlib import Path

import pytest

from helpers.pseudo_labelled import write_labelled
from helpers.small_detectors import save_teacher, small_config
from hkd_d2.cli.dispatch import run_command
from hkd_d2.export.formats import Shape, export
from hkd_d2.inference import load_detector
from hkd_d2.inference.torch_backend import build_detector


@pytest.fixture(scope="module")
def main():
    return partial(run_command, "quantize")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an export, and the words that name a data set."""
    folder = tmp_path_factory.mktemp("quantize")
    save_teacher(small_config(), folder, "weights")
    model, metadata = build_detector(folder / "weights.pth", folder / "weights.yaml")
    export(model, metadata, folder / "model.onnx", "onnx", Shape((64, 96)))
    return folder, ["coco", *map(str, write_labelled(folder / "data", 4))]


def test_table_file_and_card(main, place, capsys):
    folder, data = place
    (folder / "model_card.md").write_text("# Card\n")
    words = ["--model", str(folder / "model.onnx"), "--images", "2", "--calibration", *data]
    for _ in range(2):  # a second call replaces the section
        assert main([*words, "--data", *data]) == 0
    report = capsys.readouterr().out.split("`model_int8.onnx`: ")[-1]
    assert "calibrated on 2 images" in report
    assert "- `predictors.0.cls_score.weight`, predicts" in report
    assert "\n| float32 |" in report and "\n| INT8 |" in report and "on 4 images" in report
    record = load_detector(folder / "model_int8.onnx").metadata["quantization"]
    assert record["images"] == 2 and record["data"] == f"coco {Path(data[1]).name}"
    card = (folder / "model_card.md").read_text()
    assert card.startswith("# Card\n") and card.count("## Quantisation") == 1
    assert card.rstrip().endswith(report.rstrip()) and str(folder) not in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "0"], "--images is 0; give 1 or more."),
        (["--out", "{model}"], "--out is the model itself"),
        (["--model", "nowhere.onnx"], "'nowhere.onnx' does not exist"),
        (["--calibration", "coco", "nowhere.json", "."], "nowhere.json"),
        (["--data", "citypersons", "nowhere", "val"], "nowhere"),
        (["--data", "other", "nowhere", "val"], "other"),
    ],
)
def test_bad_input_is_one_sentence(main, place, tmp_path, capsys, words, message):
    folder, data = place
    model = str(folder / "model.onnx")
    given = ["--model", model, "--calibration", *data, "--out", str(tmp_path / "x.onnx")]
    assert main([*given, *(word.format(model=model) for word in words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hkd quantize: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "x.onnx").exists()
