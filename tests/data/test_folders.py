"""What every format that is a folder with splits has in common."""

import os

import pytest
from detectron2.data import MetadataCatalog
from small_datasets import SAMPLES

from hkd_d2.data.datasets.register import FOLDERS

FORMATS = sorted(SAMPLES)


@pytest.fixture(params=FORMATS)
def sample(request, tmp_path):
    """Format, root, split and loader of a small data set."""
    write, split = SAMPLES[request.param]
    write(tmp_path / "data")
    return request.param, tmp_path / "data", split, FOLDERS[request.param][1]


def test_sample(sample):
    form, root, split, load = sample
    records = load(str(root), split)
    assert [r["image_id"] for r in records] == [1, 2]
    assert {(r["height"], r["width"]) for r in records} == {(120, 160)}
    assert all(os.path.isfile(r["file_name"]) for r in records)
    assert records[1]["annotations"] == []
    rows = records[0]["annotations"]
    assert [row["bbox"] for row in rows] == [[20, 30, 30, 60], [90, 30, 30, 60]]
    assert [row["ignore"] for row in rows] == ([0, 0] if form == "pennfudan" else [0, 1])
    assert all(type(v) is float for row in rows for v in row["bbox"])
    assert {row["category_id"] for row in rows} == {0}


def test_splits_have_names_and_counts(sample):
    form, _, split, load = sample
    splits, _ = FOLDERS[form]
    assert split in splits
    for name in splits:
        assert MetadataCatalog.get(f"{form}_{name}").thing_classes == ["pedestrian"]


def test_wrong_folder_and_split(sample, tmp_path):
    _, root, split, load = sample
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; put .* there or set"):
        load(str(tmp_path / "nowhere"), split)
    with pytest.raises(ValueError, match=r"has the splits? .*, not 'testing'\."):
        load(str(root), "testing")
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/other.*: no "):
        load(str(tmp_path / "other"), split)


def test_missing_split(sample):
    """The folder is right, but has nothing of this split."""
    form, root, split, load = sample
    others = {"crowdhuman": "train", "eurocity": "day_val", "widerperson": "train_persons"}
    if form not in others:
        pytest.skip(f"{form} has one folder for all its splits")
    with pytest.raises(FileNotFoundError, match=f"{root}/.*(train|day).*: no "):
        load(str(root), others[form])


def test_missing_image(sample):
    form, root, split, load = sample
    records = load(str(root), split)
    os.remove(records[0]["file_name"])
    with pytest.raises(FileNotFoundError, match="1 of 2 images are missing, the first is"):
        load(str(root), split)
    if form in ("crowdhuman", "widerperson"):  # the sizes stand in the images alone
        with pytest.raises(FileNotFoundError, match="1 of 2 images are missing"):
            load(str(root), split, check_images=False)
    else:
        assert load(str(root), split, check_images=False) == records
