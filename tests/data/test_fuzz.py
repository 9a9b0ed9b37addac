"""Mutated annotation files: each is read, or refused by one sentence that names a file, quickly."""

import json
import os
import random
import signal

import pytest

from helpers.mutations import mutate_annotations
from helpers.pseudo_labelled import pseudo_labels_of, write_images
from helpers.small_datasets import SAMPLES, write_image, write_vbb
from hkd_d2.data.datasets.coco import load_coco
from hkd_d2.data.datasets.register import FOLDERS
from hkd_d2.data.pseudo_labels import read_pseudo_labels
from hkd_d2.data.streets import generate_streets

SUFFIXES = (".json", ".odgt", ".txt", ".ini", ".vbb", ".mat")
SECONDS = 10  # for the largest of these files of a few hundred bytes


def samples(root):
    """By format: the folder of a small valid data set, and a function that reads it."""
    made = {}
    for form, (write, split) in SAMPLES.items():
        write(root / form)
        load = FOLDERS[form][1]
        made[form] = (root / form, lambda load=load, form=form, split=split: load(
            str(root / form), split
        ))  # fmt: skip
    old = root / "caltech_old"
    for number in range(6, 11):
        write_vbb(old / f"annotations/set{number:02d}/V000.vbb", 30, ["person"],
                  {30: [(1, [20, 30, 30, 60], [0, 0, 0, 0])]})  # fmt: skip
        write_image(old / f"images/set{number:02d}_V000_I00029.jpg", (480, 640))
    made["caltech_old"] = (old, lambda: FOLDERS["caltech"][1](str(old), "test"))
    streets = generate_streets(
        root / "citypersons", num_train=1, num_val=1, height=64, width=64, workers=1
    )
    made["citypersons"] = (streets, lambda: FOLDERS["citypersons"][1](str(streets), "val"))
    (root / "coco").mkdir()
    write_image(root / "coco" / "1.png", (60, 80))
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 10.5, 30], "iscrowd": 0}
    row |= {"vis_bbox": [5, 5, 10, 20], "vis_ratio": 0.6, "ignore": 0, "height": 30}
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 60, "width": 80}],
        "annotations": [row, row | {"id": 2, "category_id": 2, "occlusion": 1}],
        "categories": [{"id": 1, "name": "pedestrian"}, {"id": 2, "name": "rider"}],
    }
    (root / "coco" / "gt.json").write_text(json.dumps(content))
    made["coco"] = (
        root / "coco",
        lambda: load_coco(str(root / "coco" / "gt.json"), str(root / "coco")),
    )
    labels = root / "pseudo_labels" / "labels.json"
    records = write_images(root / "pseudo_labels", 2)
    labels.write_text(json.dumps(pseudo_labels_of(records)))
    made["pseudo_labels"] = (labels.parent, lambda: read_pseudo_labels(str(labels)))
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return samples(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HKD_D2_CACHE", str(tmp_path))


FORMS = [*sorted(SAMPLES), "caltech_old", "citypersons", "coco", "pseudo_labels"]


def fuzz(folder, load, seeds):
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    assert files
    outcomes = {"read": 0, "refused": 0}
    for seed in seeds:
        rng = random.Random(seed)
        path = rng.choice(files)
        whole = path.read_bytes()
        path.write_bytes(mutate_annotations(whole, rng))
        signal.alarm(SECONDS)
        try:
            load()
            outcomes["read"] += 1
        except (ValueError, OSError) as error:
            sentence = str(error)
            assert str(folder) in sentence, f"seed {seed}: names no file: {sentence[:300]}"
            assert len(sentence) < 2000, f"seed {seed}: {len(sentence)} characters"
            assert "\n" not in sentence, f"seed {seed}: more than one line: {sentence[:300]!r}"
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {path}: {type(error).__name__}: {error}") from error
        finally:
            signal.alarm(0)
            path.write_bytes(whole)
    load()
    return outcomes


@pytest.mark.parametrize("form", FORMS)
def test_a_few_mutations(made, form):
    outcomes = fuzz(*made[form], range(10))
    assert outcomes["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_many_mutations(made, form):
    outcomes = fuzz(*made[form], range(10, int(os.getenv("HKD_FUZZ", "300"))))
    assert min(outcomes.values()) > 0
