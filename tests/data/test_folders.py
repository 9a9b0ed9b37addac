"""What every format that is a folder with splits has in common."""

import os
from functools import partial

import pytest
from detectron2.data import MetadataCatalog

from helpers.rules import rule
from helpers.small_datasets import SAMPLES
from hkd_d2.cli.dispatch import run_command
from hkd_d2.data import PedestrianMapper
from hkd_d2.data.datasets import load_coco
from hkd_d2.data.datasets.register import FOLDERS

pytestmark = rule("Every format goes through the checker, the picture and COCO JSON")


@pytest.fixture(params=sorted(SAMPLES))
def sample(request, tmp_path):
    """Format, root, split and loader of a small data set."""
    write, split = SAMPLES[request.param]
    write(tmp_path / "data")
    return request.param, tmp_path / "data", split, FOLDERS[request.param][1]


def test_sample(sample):
    form, root, split, load = sample
    records = load(str(root), split)
    assert [r["image_id"] for r in records] == [1, 2]
    sizes = {"caltech": (480, 640), "kaist": (512, 640)}
    assert {(r["height"], r["width"]) for r in records} == {sizes.get(form, (120, 160))}
    assert all(os.path.isfile(r["file_name"]) for r in records)
    assert records[1]["annotations"] == []
    rows = records[0]["annotations"]
    assert [row["bbox"] for row in rows] == [[20, 30, 30, 60], [90, 30, 30, 60]]
    assert [row["ignore"] for row in rows] == ([0, 0] if form == "pennfudan" else [0, 1])
    assert all(type(v) is float for row in rows for v in row["bbox"])
    assert {row["category_id"] for row in rows} == {0}


TEXT_SUFFIXES = {".txt", ".json", ".odgt", ".ini"}
SAVED_AS = {
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "old Mac": lambda text: text.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("program", SAVED_AS)
def test_text_files_of_other_programs(sample, program):
    """Byte order marks, encodings and line ends do not change what is read."""
    _, root, split, load = sample
    expected = load(str(root), split)
    files = [path for path in root.rglob("*") if path.suffix in TEXT_SUFFIXES]
    assert files
    for path in files:
        path.write_bytes(SAVED_AS[program](path.read_text()))
    assert load(str(root), split) == expected


@pytest.mark.parametrize(
    "name",
    [
        b"caf\xe9",  # of an old archive, not UTF-8
        b"line\nbreak",
        b"100%(d)s #1 'x' \"y\" [a]*?",
        "Stra\u00dfe \u4eba".encode(),
        b" blank at both ends ",
    ],
)
def test_a_root_of_any_name(sample, tmp_path, name):
    """Twice: parsed, and from the cache."""
    _, root, split, load = sample
    expected = load(str(root), split)
    other = os.path.join(tmp_path, os.fsdecode(name))
    root.rename(other)
    for _ in range(2):
        records = load(other, split)
        assert [r["annotations"] for r in records] == [r["annotations"] for r in expected]
        assert [os.path.relpath(r["file_name"], other) for r in records] == [
            os.path.relpath(r["file_name"], root) for r in expected
        ]


def test_splits_have_names(sample):
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
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/other.*(: no | does not exist)"):
        load(str(tmp_path / "other"), split)


@pytest.mark.parametrize(
    ("sample", "other"),
    [("crowdhuman", "train"), ("eurocity", "day_val"), ("widerperson", "train_persons")],
    indirect=["sample"],
)
def test_missing_split(sample, other):
    """The folder is right, but has nothing of this split; the other formats have one folder."""
    _, root, _, load = sample
    with pytest.raises(FileNotFoundError, match=f"{root}/.*(train|day).*(: no | does not exist)"):
        load(str(root), other)


@rule("Nothing is parsed twice: the cache gives the same bits, and any changed source is seen")
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


def test_picture(sample, draw):
    form, root, split, load = sample
    rows = [row for record in load(str(root), split) for row in record["annotations"]]
    crowd = sum(row["iscrowd"] for row in rows)
    counts = {"pedestrian": 2 if form == "pennfudan" else 1, "crowd": crowd}
    counts["ignored"] = 2 - sum(counts.values())
    counts["visible part"] = 2 if form == "crowdhuman" else 0
    assert draw(form, root, split) == counts
    assert crowd == (form == "widerperson")


def test_checker_and_coco_file(sample, capsys):
    form, root, split, load = sample
    main = partial(run_command, "data check")
    assert main([form, "--root", str(root), "--splits", split, "--write-coco"]) == 0
    assert f"{split}: images found: 2 of 2" in capsys.readouterr().out
    kept = ("bbox", "vis_bbox", "ignore", "iscrowd", "category_id")
    records = load(str(root), split)
    written = load_coco(str(root / "annotations" / f"{split}_gt.json"), str(root))
    for ours, theirs in zip(records, written, strict=True):
        assert os.path.samefile(ours.pop("file_name"), theirs.pop("file_name"))
        rows, copies = ours.pop("annotations"), theirs.pop("annotations")
        assert ours == theirs
        for row, copy in zip(rows, copies, strict=True):
            assert {k: row[k] for k in kept if k in row} == {k: copy[k] for k in kept if k in copy}
            assert copy["vis_ratio"] == pytest.approx(row["vis_ratio"], abs=1e-11)


PUBLISHED = {"mot17": 5316, "mot20": 8931, "pennfudan": 170}


def test_checker_finds_what_is_missing(sample, capsys):
    form, root, split, load = sample
    main = partial(run_command, "data check")
    os.remove(load(str(root), split)[0]["file_name"])
    assert main([form, "--root", str(root), "--splits", split]) == 1
    out = capsys.readouterr().out
    assert f"{split}: UNUSABLE: " in out and "the first is " in out
    if form in PUBLISHED:
        assert f"2  DIFFERS from the published {PUBLISHED[form]}" in out


def test_training_sees_objects_and_ignored_rows(sample):
    form, root, split, load = sample
    mapper = PedestrianMapper(
        True, augmentations=[], image_format="BGR", min_height=50, min_visibility=0.0
    )
    first, second = (mapper(record)["instances"] for record in load(str(root), split))
    assert first.gt_boxes.tensor.tolist() == [[20, 30, 50, 90], [90, 30, 120, 90]]
    assert first.gt_classes.tolist() == [0, 0 if form == "pennfudan" else -1]
    assert len(second) == 0
