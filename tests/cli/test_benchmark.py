"""hkd benchmark."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from helpers.pseudo_labelled import write_labelled
from helpers.rules import rule
from helpers.small_detectors import one_stage_config, save_teacher, small_config
from hkd_d2.cli.dispatch import run_command

pytestmark = rule("Models are compared in one run, in turns, with the evaluator's own miss rate")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def main():
    return partial(run_command, "benchmark")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, cfg in (("big", small_config()), ("small", one_stage_config("FCOS"))):
        (folder / name).mkdir()
        config, _ = save_teacher(cfg, folder / name, "model")
        Path(config).rename(folder / name / "config.yaml")
    annotations, images = write_labelled(folder / "data", 4)
    return folder, ["--data", "coco", annotations, images]


def test_table_numbers_and_plot(main, place, tmp_path, monkeypatch, capsys):
    folder, data = place
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    models = [f"--model={name}={folder}/{name}/model.pth" for name in ("big", "small")]
    options = ["--rounds", "2", "--batches", "2", "1", "--threads", "1", "--out", str(tmp_path)]
    assert main([*models, *data, *options]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert (content["rounds"], content["num_images"], content["threads"]) == (2, 4, 1)
    for row, name in zip(content["rows"], ("big", "small"), strict=True):
        assert row["model"] == name
        assert row["file_bytes"] == (folder / name / "model.pth").stat().st_size
        assert row["parameters"] > 1e4 and row["gflops"] > 0
        assert list(row["latency"]) == ["1", "2"]
        assert row["latency"]["2"]["p90_ms"] >= row["latency"]["2"]["p50_ms"] > 0
        if sys.platform == "linux":
            assert 1e8 < row["resident_bytes"] < 5e9
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| ") == 2 and "| big |" in table
    assert table in capsys.readouterr().out
    assert min(Image.open(tmp_path / "accuracy_latency.png").size) > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere.pth"], "'nowhere.pth' does not exist"),
        (["--model", "{big}", "--model", "{big}"], "Two models are named 'model'"),
        (["--model", "{big}", "--rounds", "0"], "--rounds is 0; give 1 or more"),
        (["--model", "{big}", "--batches", "1", "0"], "--batches is 0"),
        (["--model", "{big}", "--pedestrian", "cat"], "model has no class 'cat'"),
        (["--model", "{big}", "--data", "kitti", "a", "b"], "unknown format 'kitti'"),
        (["--model", "{big}", "--data", "coco", "gone.json", "b"], "gone.json"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(main, place, capsys, arguments, message):
    folder, data = place
    arguments = [text.format(big=folder / "big" / "model.pth") for text in arguments]
    if "--data" not in arguments:
        arguments = [*arguments, *data]
    assert main([*arguments, "--out", "gone"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hkd benchmark: ") and message in said, said
    assert not Path("gone").exists()
