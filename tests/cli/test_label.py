"""hkd label."""

import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from helpers.pseudo_labelled import write_images, write_labelled
from helpers.small_detectors import one_stage_config, save_teacher
from hkd_d2.cli.dispatch import run_command
from hkd_d2.data.pseudo_labels import file_sha256, read_pseudo_labels


@pytest.fixture(scope="module")
def main():
    return partial(run_command, "label")


@pytest.fixture
def teacher(tmp_path):
    return save_teacher(one_stage_config("IgnoreAwareRetinaNet"), tmp_path)


def test_a_folder_and_a_registered_data_set(main, teacher, tmp_path, capsys):
    config_file, weights = teacher
    write_images(tmp_path / "images" / "below", 2)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (64, 96)).save(tmp_path / "images" / "a.JPG", exif=turned)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    out = tmp_path / "file.json"
    command = ["--config-file", config_file, "--model", weights, "--out", str(out)]
    images = ["--images", str(tmp_path / "images")]
    assert main([*command, *images, "--classes", "person"]) == 0
    assert "file.json: 3 images, " in capsys.readouterr().out
    pseudo = read_pseudo_labels(str(out))
    names = [Path(r["file_name"]).name for r in pseudo.records]
    assert names == ["a.JPG", "001.png", "002.png"] and pseudo.classes == ["person"]
    assert (pseudo.records[0]["width"], pseudo.records[0]["height"]) == (96, 64)
    info = pseudo.info
    assert info["teacher_config"] == config_file and info["teacher_weights"] == weights
    assert info["teacher_sha256"] == file_sha256(weights) and info["score_threshold"] == 0.4
    assert info["tool"] == "hkd label 1" and info["date_created"].endswith("+00:00")
    scores = [row["score"] for row in json.loads(out.read_text())["annotations"]]
    assert min(scores) > 0.4

    # Another file replaces it; the classes are those of the teacher's training set.
    name = f"tool_{tmp_path.name}"
    entry = [name, "coco", *write_labelled(tmp_path / "labelled", 4, name="walker")]
    options = ["HKD.DATA.REGISTER", str([entry]), "DATASETS.TRAIN", f"('{name}',)"]
    assert main([*command, "--data", name, "--score-threshold", "0.6", *options]) == 0
    pseudo = read_pseudo_labels(str(out))
    assert len(pseudo.records) == 4 and pseudo.classes == ["walker"]
    assert pseudo.info["teacher_options"] == options
    assert min(r["score"] for r in json.loads(out.read_text())["annotations"]) > 0.6


def test_refusals_are_one_sentence(main, teacher, tmp_path, capsys):
    config_file, weights = teacher
    write_images(tmp_path / "images", 1)
    out = tmp_path / "file.json"

    def refused(*changes, config=config_file, source=("--images", str(tmp_path / "images"))):
        command = ["--config-file", config, "--model", weights, "--out", str(out), *source]
        assert main([*command, "--classes", "person", *changes]) == 2
        said = capsys.readouterr().err
        assert said.startswith("hkd label: ") and said.count("\n") == 1
        return said

    assert "config file 'nowhere.yaml' is neither in" in refused(config="nowhere.yaml")
    assert "is no folder with images" in refused(source=("--images", str(tmp_path / "none")))
    assert "'unheard' is not registered" in refused(source=("--data", "unheard"))
    assert "give a number from 0 to 1" in refused("--score-threshold", "2")
    out.write_text("mine")
    assert "is there already and holds no pseudo-labels" in refused()
    assert out.read_text() == "mine"


def test_bad_images_of_a_folder_are_left_out(main, teacher, tmp_path, capsys):
    config_file, weights = teacher
    folder = tmp_path / "images"
    write_images(folder, 2)
    (folder / "bad.png").write_text("text")
    Image.new("RGB", (2000, 1)).save(folder / "line.png")
    whole = (folder / "001.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "file.json"
    command = ["--config-file", config_file, "--model", weights, "--out", str(out)]
    options = ["--images", str(folder), "--classes", "person", "INPUT.MAX_SIZE_TEST", "900"]
    assert main([*command, *options]) == 1
    said = capsys.readouterr().err
    for name in ("bad.png", "line.png", "cut.png"):
        assert said.count(f"{name}'") == 1
    names = [Path(r["file_name"]).name for r in read_pseudo_labels(str(out)).records]
    assert names == ["001.png", "002.png"]
    for name in names:
        (folder / name).unlink()
    assert main([*command, *options]) == 2
    assert "can be labelled; name another folder" in capsys.readouterr().err
