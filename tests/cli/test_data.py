"""hkd data check, view, split and streets; tests/data/test_crops.py has crop."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from hkd_d2.cli.dispatch import run_command


@pytest.fixture(scope="module")
def prepare():
    return partial(run_command, "data check")


@pytest.fixture(scope="module")
def split():
    return partial(run_command, "data split")


def test_prepare_reports_every_form(prepare, write_citypersons, capsys):
    root = write_citypersons("mat", "coco")
    assert prepare(["citypersons", str(root), "val"]) == 0
    out = capsys.readouterr().out
    assert "val: cityscapes: missing" in out
    assert out.count("images                3  DIFFERS from the published 500") == 2
    assert out.count("positives             2  DIFFERS from the published 2549") == 2
    assert "val: images found: 3 of 3" in out
    assert prepare(["citypersons", str(root)]) == 1  # nothing of train
    assert "train: UNUSABLE: " in capsys.readouterr().out


def test_prepare_finds_what_is_unusable(prepare, write_citypersons, capsys, tmp_path):
    root = write_citypersons("mat", "coco")
    arguments = ["citypersons", str(root), "val"]
    next(root.glob("leftImg8bit/val/ulm/*.png")).unlink()
    assert prepare(arguments) == 1
    out = capsys.readouterr().out
    assert "images found: 2 of 3" in out and "the first is" in out and "ulm_000002" in out
    (root / "annotations" / "anno_val.mat").write_bytes(b"")
    assert prepare(arguments) == 1  # the loader takes the first form that is there
    out = capsys.readouterr().out
    assert "val: mat: UNUSABLE: " in out and "val: UNUSABLE: " in out and "val: coco:" in out
    assert prepare(["citypersons", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    # The words of tools/prepare_data.py.
    assert prepare(["citypersons", "--root", str(root), "--splits", "test"]) == 2
    assert "citypersons has no split 'test', but train, val" in capsys.readouterr().err


def test_prepare_writes_coco(prepare, write_citypersons, capsys):
    root = write_citypersons("coco")
    path = root / "annotations" / "val_gt.json"
    expected = json.loads(path.read_text())
    path.unlink()
    write_citypersons("cityscapes")
    arguments = ["citypersons", str(root), "val", "--write-coco"]
    assert prepare(arguments) == 0
    written = json.loads(path.read_text())
    assert written["annotations"] == expected["annotations"]
    assert written["images"] == expected["images"]
    path.write_text("mine")
    assert prepare(arguments) == 0
    assert path.read_text() == "mine" and "left alone" in capsys.readouterr().out


@pytest.fixture
def labelled_image(tmp_path):
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(tmp_path / "1.png")
    rows = [
        {"bbox": [1, 2, 10, 30]},
        {"bbox": [20, 2, 10, 30], "ignore": 1},
        {"bbox": [30, 2, 30, 30], "iscrowd": 1},
    ]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 40, "width": 60}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, **r} for i, r in enumerate(rows)
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(content))
    return tmp_path / "gt.json"


def test_an_entry(visualize, labelled_image, tmp_path, capsys):
    out = tmp_path / "picture.png"
    assert visualize(["coco", str(labelled_image), str(tmp_path), "--out", str(out)]) == 0
    assert "pedestrian 1, ignored 1, crowd 1, visible part 0" in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.format == "PNG"


def test_a_name_of_a_config(visualize, labelled_image, tmp_path, capsys, monkeypatch):
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"HKD: {{DATA: {{REGISTER: [[mine, coco, {labelled_image}, {tmp_path}]]}}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert visualize(["mine", "--config-file", str(config)]) == 0
    assert (tmp_path / "samples_mine.png").is_file()


def test_one_sentence_for_what_is_wrong(visualize, tmp_path, capsys):
    out = ["--out", str(tmp_path / "a.png")]
    assert visualize(["unheard_of", *out]) == 2
    assert "'unheard_of' is not registered" in capsys.readouterr().err
    assert visualize(["citypersons", str(tmp_path / "nowhere"), "val", *out]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert visualize(["citypersons", "val"]) == 2
    assert "three words" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def video_file(tmp_path):
    names = ["s1/a.jpg", "s1/b.jpg", "s10/a.jpg", "s2/img/a.jpg"]
    size = {"height": 9, "width": 9}
    content = {
        "info": "kept",
        "categories": [{"id": 1, "name": "pedestrian"}],
        "images": [{"id": i, "file_name": name, **size} for i, name in enumerate(names, start=4)],
        "annotations": [
            {"id": i, "image_id": 4 + i % 4, "category_id": 1, "bbox": [0, 0, 5, 5]}
            for i in range(8)
        ],
    }
    path = tmp_path / "video.json"
    path.write_text(json.dumps(content))
    return path


def test_split_by_folder(split, video_file, tmp_path):
    out = tmp_path / "part.json"
    split([str(video_file), "--by-folder", "s1", "s2/", "--out", str(out)])
    part = json.loads(out.read_text())
    assert [image["id"] for image in part["images"]] == [4, 5, 7]  # not s10
    assert [row["id"] for row in part["annotations"]] == [0, 1, 3, 4, 5, 7]
    assert part["info"] == "kept" and part["categories"][0]["name"] == "pedestrian"


def test_split_refuses(split, video_file, tmp_path, capsys):
    out = tmp_path / "part.json"
    assert split([str(video_file), "--by-folder", "s1", "s3", "--out", str(out)]) == 2
    assert "video.json: no image lies in s3" in capsys.readouterr().err
    video_file.write_text("{}")
    assert split([str(video_file), "--by-folder", "s1", "--out", str(out)]) == 2
    assert "video.json: no COCO annotation file" in capsys.readouterr().err
    assert not out.exists()
