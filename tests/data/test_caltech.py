"""Caltech: videos, both kinds of annotations, both versions of the test set's ground truth."""

from functools import partial
from pathlib import Path

import pytest
from detectron2.structures import BoxMode

from helpers.rules import rule
from helpers.small_datasets import jpeg, write_bbgt, write_caltech_new, write_seq, write_vbb
from hkd_d2.cli.dispatch import run_command
from hkd_d2.data.datasets.caltech import load_caltech, read_vbb

NONE = [0, 0, 0, 0]
LABELS = ["person", "person?", "people", "person-fa"]
# Ids and frames are counted from 1: of 60 frames 30 and 60 are tested on.
ROWS = {
    29: [(1, [1, 1, 9, 9], NONE)],
    30: [
        (1, [201, 101, 20, 50], [201, 101, 20, 25]),
        (2, [301, 101, 20, 50], NONE),
        (3, [401.5, 101, 80, 50], NONE),
        (4, [501, 101, 20, 50], NONE),
        (1, [-40, 101, 20, 50], NONE),
    ],
    60: [(1, [202, 102, 20, 50], NONE), (1, [302, 102, 20, 50], [302, 102, 20, 50])],
}
FRAMES = [jpeg(4 * i, (480, 640)) for i in range(60)]


def write_videos(root, sets, where="."):
    """A video of 60 frames with its annotations in each set."""
    for number in sets:
        write_vbb(root / "annotations" / f"set{number:02d}" / "V000.vbb", 60, LABELS, ROWS)
        write_seq(root / where / f"set{number:02d}" / "V000.seq", FRAMES)


@pytest.fixture(scope="module")
def prepare():
    return partial(run_command, "data check")


@rule("Caltech is read by its toolbox's rules")
def test_old_annotations(tmp_path):
    write_videos(tmp_path, range(6, 11))
    records = load_caltech(str(tmp_path), "test", check_images=False)
    assert [r["image_id"] for r in records] == list(range(1, 11))
    assert [Path(r["file_name"]).name for r in records[:3]] == [
        "set06_V000_I00029.jpg",
        "set06_V000_I00059.jpg",
        "set07_V000_I00029.jpg",
    ]
    assert {(r["height"], r["width"]) for r in records} == {(480, 640)}
    rows = records[0]["annotations"]
    assert rows[0] == {
        "bbox": [200, 100, 20, 50],  # counted from 0
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "ignore": 0,
        "vis_bbox": [200, 100, 20, 25],
        "vis_ratio": 0.5,
        "label": "person",
    }
    # False alarms of the annotators' detector are left out; a person outside the image is ignored.
    assert [row["label"] for row in rows] == ["person", "person?", "people", "person"]
    assert [row["ignore"] for row in rows] == [0, 1, 1, 1]
    assert [row["iscrowd"] for row in rows] == [0, 0, 1, 0]
    assert [row["vis_ratio"] for row in rows] == [0.5, 1, 1, 1]  # no visible box: wholly visible
    assert "vis_bbox" not in rows[1] and rows[2]["bbox"] == [400.5, 100, 80, 50]
    # Unlike bbLoad, dbEval knows no rule for equal boxes.
    assert [row["vis_ratio"] for row in records[1]["annotations"]] == [1, 1]


def test_training_frames(tmp_path):
    write_videos(tmp_path, range(6))
    every_30th = load_caltech(str(tmp_path), "train", check_images=False)
    every_3rd = load_caltech(str(tmp_path), "train10x", check_images=False)
    assert len(every_30th) == 6 * 2 and len(every_3rd) == 6 * 20
    names = [Path(r["file_name"]).stem[-2:] for r in every_3rd[:20]]
    assert names == [f"{i:02d}" for i in range(2, 60, 3)]  # counted from 0
    assert every_3rd[9]["annotations"] == every_30th[0]["annotations"]
    assert every_3rd[8]["annotations"] == []  # not frame 29 of the file, counted from 1


@rule("Caltech is read by its toolbox's rules")
def test_new_annotations(tmp_path):
    rows = [
        "person 201 101 20 50 1 201 101 20 25 0 0",  # half visible
        "person 301 101 20 50 0 301 101 20 25 0 0",  # not marked occluded
        "person 301 201 20 50 1 0 0 0 0 0 0",  # no visible box
        "person 301 301 20 50 1 301 301 20 50 0 0",  # the whole box: barely visible
        "people 401 101 80 50 0 0 0 0 0 0 0",  # counts, as bbLoad has it
        "people 401 201 80 50 0 0 0 0 0 1 0",
        "person? 501 101 20 50 0 0 0 0 0 1 0",
        "ignore 501 201 20 50 0 0 0 0 0 0 0",
    ]
    write_caltech_new(tmp_path, "train10x_new", {"set00_V000_I00002": rows})
    (record,) = load_caltech(str(tmp_path), "train10x_new")
    found = record["annotations"]
    assert [row["bbox"] for row in found[:2]] == [[200, 100, 20, 50], [300, 100, 20, 50]]
    assert [row["vis_ratio"] for row in found] == [0.5, 1, 1, 0, 1, 1, 1, 1]
    assert ["vis_bbox" in row for row in found[:4]] == [True, True, False, True]
    assert found[0]["vis_bbox"] == [200, 100, 20, 25]
    assert [row["ignore"] for row in found] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert [row["iscrowd"] for row in found] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert found[6]["label"] == "person?"


@rule("Caltech is read by its toolbox's rules")
def test_two_ground_truths_of_the_test_set(tmp_path):
    # Pixels counted from 1: the border is 5 <= x, x + w <= 635, 5 <= y, y + h <= 475.
    corners = [(5, 5), (4, 5), (5, 4), (615, 425), (616, 425), (615, 426), (300, 200)]
    rows = [f"person {x} {y} 20 50 0 0 0 0 0 0 0" for x, y in corners]
    rows[-1] = rows[-1][:-3] + "1 0"
    write_caltech_new(tmp_path, "test_new", {"set06_V000_I00029": rows, "set06_V000_I00059": []})
    as_flagged = load_caltech(str(tmp_path), "test_new")
    bordered = load_caltech(str(tmp_path), "test_new_border")
    assert [row["ignore"] for row in as_flagged[0]["annotations"]] == [0] * 6 + [1]
    assert [row["ignore"] for row in bordered[0]["annotations"]] == [0, 1, 1, 0, 1, 1, 1]
    assert [r["file_name"] for r in as_flagged] == [r["file_name"] for r in bordered]
    for one, other in zip(as_flagged[0]["annotations"], bordered[0]["annotations"], strict=True):
        assert one["bbox"] == other["bbox"]


# ------------------------------------------------------------------ extraction of the frames


@rule("Frames come out of .seq videos byte by byte")
@pytest.mark.parametrize("where", [".", "videos"])
def test_frames_are_extracted_byte_by_byte(tmp_path, prepare, capsys, where, draw):
    write_videos(tmp_path, range(6, 11), where)
    with pytest.raises(FileNotFoundError, match="images: no frame of split 'test'; extract them"):
        load_caltech(str(tmp_path), "test")
    assert prepare(["caltech", str(tmp_path), "test"]) == 0
    out = capsys.readouterr().out
    assert "images               10  DIFFERS from the published 4024" in out
    assert "test: images found: 10 of 10" in out
    for record in load_caltech(str(tmp_path), "test"):
        frame = int(record["file_name"][-9:-4])
        assert Path(record["file_name"]).read_bytes() == FRAMES[frame]
    assert len(list((tmp_path / "images").iterdir())) == 10  # nothing else
    # What is there is not extracted again; what is missing is.
    kept, lost = sorted((tmp_path / "images").iterdir())[:2]
    time = kept.stat().st_mtime_ns
    lost.unlink()
    assert prepare(["caltech", str(tmp_path), "test"]) == 0
    assert kept.stat().st_mtime_ns == time and lost.read_bytes() == FRAMES[59]
    capsys.readouterr()
    counts = draw("caltech", tmp_path, "test")
    assert counts["pedestrian"] > 0 and counts["crowd"] > 0 and counts["visible part"] > 0


def test_extraction_fails_in_one_sentence(tmp_path, prepare, capsys):
    write_videos(tmp_path, range(6, 11))
    video = tmp_path / "set08" / "V000.seq"
    video.write_bytes(video.read_bytes()[:-3000])
    assert prepare(["caltech", str(tmp_path), "test"]) == 1
    out = capsys.readouterr().out
    assert "test: UNUSABLE: " in out and "set08/V000.seq: frame" in out and "truncated" in out
    assert not list((tmp_path / "images").glob("*.part"))
    video.unlink()
    assert prepare(["caltech", str(tmp_path), "test"]) == 1
    assert "set08/V000.seq: no such video" in capsys.readouterr().out


# ------------------------------------------------------------------ errors


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="annotations: no file set06/V000.vbb; unpack"):
        load_caltech(str(tmp_path), "test")
    with pytest.raises(FileNotFoundError, match="anno_test_1xnew: no file setXX_VYYY_IZZZZZ.txt"):
        load_caltech(str(tmp_path), "test_new_border")
    write_videos(tmp_path, range(6, 9))
    with pytest.raises(FileNotFoundError, match=r"set09: no file V\*.vbb; unpack all"):
        load_caltech(str(tmp_path), "test")


def test_damaged_vbb(tmp_path):
    path = tmp_path / "V000.vbb"
    write_vbb(path, 60, LABELS, ROWS)
    assert len(read_vbb(str(path))) == 60
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="V000.vbb: no .vbb file, A with nFrame.*fetch it"):
            read_vbb(str(path))
    message = "V000.vbb: frame 30 object 2: id of an object labelled person, "
    for row in ((9, [1, 1, 2, 2], NONE), (1, [1, 1, 2], NONE), (5, [1, 1, 2, 2], NONE)):
        write_vbb(path, 60, [*LABELS, "horse"], {30: [ROWS[30][0], row]})
        with pytest.raises(ValueError, match=message):
            read_vbb(str(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("person 1 2 3 4 0 0 0 0 0", "line 2: 'label x y w h .*it is truncated"),
        ("person 1 2 3 4 0 0 0 0 0 2 0", "line 2: .*ignore 0 or 1, not 'person 1 2 3 4"),
        ("person 1 2 x 4 0 0 0 0 0 0 0", "line 2: 'label x y w h "),
        ("horse 1 2 3 4 0 0 0 0 0 0 0", "line 2: unknown label 'horse', known are person"),
        ("person 1 2 -3 4 0 0 0 0 0 0 0", "line 2: bbox .* negative width or height"),
        ("person 100 2 0 4 0 0 0 0 0 0 0", "line 2: bbox .* has no area inside the 640x480 image"),
    ],
)
def test_malformed_row(tmp_path, row, message):
    write_caltech_new(tmp_path, "test_new", {"set06_V000_I00029": [row]})
    with pytest.raises(ValueError, match=f"set06_V000_I00029.jpg.txt: {message}"):
        load_caltech(str(tmp_path), "test_new")


def test_file_without_its_header_or_its_name(tmp_path):
    write_caltech_new(tmp_path, "test_new", {"set06_V000_I00029": []})
    folder = tmp_path / "annotations" / "anno_test_1xnew"
    (path,) = folder.iterdir()
    path.write_text("")
    with pytest.raises(ValueError, match="the first line must be '% bbGt version=3'"):
        load_caltech(str(tmp_path), "test_new")
    path.unlink()
    write_bbgt(folder / "readme.txt")
    with pytest.raises(ValueError, match="readme.txt: a name such as set06_V000_I00029.txt"):
        load_caltech(str(tmp_path), "test_new")
