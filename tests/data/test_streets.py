"""Synthetic streets: the same pictures every time, and boxes true to the painted pixels."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_d2.data.streets import (
    Difficulty,
    contact_sheet,
    draw_street,
    generate_streets,
    street_paths,
)
from hkd_d2.data.streets.boxes import aligned
from hkd_d2.data.streets.street import Street

LABELS = {"pedestrian", "rider", "sitting person", "person (other)", "person group", "ignore"}
SMALL = {"num_train": 3, "num_val": 2, "height": 96, "width": 160, "seed": 7}


def digest(root):
    """Hash of all names and contents below a folder."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    parts = [str(path.relative_to(root)).encode() + path.read_bytes() for path in files]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    return generate_streets(tmp_path_factory.mktemp("streets"), workers=1, **SMALL)


@pytest.fixture(scope="module")
def forty():
    return [draw_street(index=index) for index in range(40)]


def pedestrians(objects):
    """(height, visible share) of every pedestrian."""
    rows = [row for row in objects if row["label"] == "pedestrian"]
    shares = [np.prod(row["bboxVis"][2:]) / np.prod(row["bbox"][2:]) for row in rows]
    return [(row["bbox"][3], share) for row, share in zip(rows, shares, strict=True)]


@pytest.mark.long
def test_same_files_for_any_number_of_workers(streets, tmp_path):
    generate_streets(tmp_path / "two", workers=2, **SMALL)
    assert digest(tmp_path / "two") == digest(streets)


def test_picture_depends_on_seed_split_and_index():
    small = {"height": 64, "width": 96}
    one = draw_street(seed=1, index=2, **small)
    again = draw_street(seed=1, index=2, **small)
    assert np.array_equal(one[0], again[0]) and one[1] == again[1]
    for other in ({"seed": 2, "index": 2}, {"seed": 1, "index": 3}):
        assert not np.array_equal(one[0], draw_street(**other, **small)[0])
    assert not np.array_equal(one[0], draw_street(seed=1, index=2, split="val", **small)[0])


def test_on_disk_form(streets):
    for split, number in (("train", 3), ("val", 2)):
        images = list((streets / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        assert len(images) == number
        for image in images:
            city, stem = image.parent.name, image.name.removesuffix("_leftImg8bit.png")
            assert stem.startswith(city + "_") and len(stem.split("_")) == 3
            json_name = f"{stem}_gtBboxCityPersons.json"
            rows = json.loads(
                (streets / "gtBboxCityPersons" / split / city / json_name).read_text()
            )
            assert cv2.imread(str(image)).shape == (96, 160, 3)
            assert (rows["imgHeight"], rows["imgWidth"]) == (96, 160)
            for row in rows["objects"]:
                assert set(row) == {"label", "instanceId", "bbox", "bboxVis"}
    assert not list(streets.rglob("*.part"))


def test_boxes_of_a_scene_painted_by_hand():
    street = Street(np.random.default_rng(0), 64, 96, Difficulty())
    canvas = street.canvas

    def paint(label, x0, y0, x1, y1):
        """A person who fills columns x0..x1 and rows y0..y1."""
        canvas.at(0, 0, 1)
        with street.painting(label):
            canvas.rectangle(x0, -y1, x1, -y0, (10, 20, 30))

    paint("pedestrian", 10, 20, 20, 50)  # object 0; its lower half is hidden below
    paint("pedestrian", -6, 20, 4, 50)  # object 1; leaves the image on the left
    paint("pedestrian", 40, 20, 50, 40)  # object 2; 18 of its 20 rows are hidden: 10 %, kept
    paint("pedestrian", 60, 20, 70, 50)  # object 3; 28 of its 30 rows are hidden: 7 %
    paint("pedestrian", 80, 20, 85, 30)  # hidden altogether: no row
    paint("person group", 88, 30, 100, 40)  # object 4; four columns outside
    paint("rider", 24, 0, 34, 40)  # object 5
    canvas.at(0, 0, 1)
    for x0, y0, x1, y1 in ((8, 35, 22, 60), (38, 22, 52, 60), (58, 22, 72, 60), (78, 18, 87, 60)):
        canvas.rectangle(x0, -y1, x1, -y0, (90, 90, 90))

    rows, owner = street.annotate()
    # Pedestrians: 0.41 times the height about the middle, so 12.3 -> 12 columns for 30 rows and
    # 8.2 -> 8 for 20. Of object 1 the last 4 of 10 columns are seen: 4.8 -> 5 of its 12.
    assert [(row["label"], row["bbox"], row["bboxVis"]) for row in rows] == [
        ("pedestrian", [9, 20, 12, 30], [9, 20, 12, 15]),
        ("pedestrian", [-7, 20, 12, 30], [0, 20, 5, 30]),
        ("pedestrian", [41, 20, 8, 20], [41, 20, 8, 2]),
        ("ignore", [60, 20, 10, 2], [60, 20, 10, 2]),
        ("person group", [88, 30, 8, 10], [88, 30, 8, 10]),
        ("rider", [24, 0, 10, 40], [24, 0, 10, 40]),
    ]
    # Ids as in Cityscapes: 24xxx a person, 25xxx a rider, 0 a region.
    assert [row["instanceId"] // 1000 for row in rows] == [24, 24, 24, 0, 0, 25]
    assert [int((owner == 1 + i).sum()) for i in range(6)] == [150, 120, 20, 20, 80, 400]


def test_visible_boxes_are_those_of_the_seen_pixels(forty):
    for _, objects, owner in forty:
        assert owner.max() == len(objects)
        for number, row in enumerate(objects, 1):
            pixels = [(x, y) for y, x in zip(*np.nonzero(owner == number), strict=True)]
            xs, ys = zip(*pixels, strict=True)
            box = [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]
            if row["label"] == "pedestrian":  # stretched sideways, see the test below
                assert row["bboxVis"][1::2] == box[1::2]
            else:
                assert row["bboxVis"] == box


def test_visible_boxes_lie_in_full_boxes_and_in_the_image(forty):
    outside = 0
    for image, objects, _ in forty:
        height, width = image.shape[:2]
        for row in objects:
            x, y, w, h = row["bbox"]
            vx, vy, vw, vh = row["bboxVis"]
            assert vw > 0 and vh > 0 and 0 <= vx and 0 <= vy
            assert vx + vw <= width and vy + vh <= height
            assert x <= vx and y <= vy and vx + vw <= x + w and vy + vh <= y + h
            outside += x < 0 or x + w > width or y + h > height
    assert outside > 0  # full boxes may leave the image, as in the real data


def test_labels(forty):
    seen = {row["label"] for _, objects, _ in forty for row in objects}
    assert seen <= LABELS
    assert {"pedestrian", "rider", "sitting person", "person group", "ignore"} <= seen


def test_counts_make_an_evaluation(forty):
    people = [pedestrians(objects) for _, objects, _ in forty]
    rows = [row for picture in people for row in picture]
    assert 2.0 <= sum(h >= 50 and v >= 0.65 for h, v in rows) / len(people) <= 4.0
    assert 0.5 <= sum(h >= 50 and 0.2 <= v <= 0.65 for h, v in rows) / len(people) <= 2.0
    assert sum(h >= 20 and v >= 0.2 for h, v in rows) / len(people) >= 3.0
    assert 1 <= sum(not picture for picture in people) <= 12  # pictures without a pedestrian
    heights = np.array([h for h, _ in rows])
    assert heights.min() < 25 and heights.max() > 110
    assert np.mean((heights >= 15) & (heights <= 125)) > 0.8


@pytest.mark.long
def test_pedestrians_have_the_aspect_of_citypersons(forty):
    shapes = [
        row["bbox"] for _, objects, _ in forty for row in objects if row["label"] == "pedestrian"
    ]
    assert all(abs(w - 0.41 * h) <= 0.5 + 1e-9 for _, _, w, h in shapes)


def test_stretching_keeps_the_visible_share():
    # 20 columns become 41 for 100 rows; the right half of them, seen, becomes the right half.
    full, visible = aligned([50, 10, 20, 100], [60, 10, 10, 100], image_width=320)
    assert full == [39, 10, 41, 100]
    assert visible[0] in (59, 60) and visible[0] + visible[2] == 80
    # The left edge of the image cuts the visible box, not the full one.
    full, visible = aligned([-4, 10, 20, 100], [0, 10, 16, 100], image_width=320)
    assert full == [-15, 10, 41, 100] and visible == [0, 10, 26, 100]
    # A sliver at the border keeps a column.
    full, visible = aligned([310, 10, 60, 100], [310, 10, 10, 100], image_width=320)
    assert visible[2] >= 1 and full[0] <= visible[0] and visible[0] + visible[2] <= 320


def test_no_people_where_all_pictures_are_empty():
    empty = Difficulty(empty=1.0)
    for index in range(5):
        _, objects, _ = draw_street(index=index, height=96, width=160, difficulty=empty)
        assert {row["label"] for row in objects} <= {"ignore"}  # mannequins in shop windows


def test_second_call_reuses_and_completes(streets, capsys):
    before = digest(streets)
    times = {path: path.stat().st_mtime_ns for path in streets.rglob("*") if path.is_file()}
    generate_streets(streets, workers=1, **SMALL)
    assert "already" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in times}
    for path in street_paths(streets, "train", 1):  # as after an interrupted run
        path.unlink()
    generate_streets(streets, workers=1, **SMALL)
    assert digest(streets) == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"num_train": 4},
        {"width": 192},
        {"difficulty": Difficulty(people=1.0)},
    ],
)
def test_other_parameters_in_the_same_folder_are_refused(streets, change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"other parameters.*{name}.*another folder"):
        generate_streets(streets, workers=1, **{**SMALL, **change})


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder.*choose another folder"):
        generate_streets(tmp_path, workers=1, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "name, value", [("num_train", -1), ("height", 32), ("seed", -1), ("workers", 0)]
)
def test_parameters_out_of_range_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} .*must be at least .*got {value}"):
        generate_streets(tmp_path / "new", **{**SMALL, name: value})
    assert not (tmp_path / "new").exists()


def test_contact_sheet(streets, tmp_path):
    # Two pictures in a row, one row a split, each at twice its 96 x 160 pixels.
    assert contact_sheet(streets, columns=2, rows=2).shape == (384, 640, 3)
    with pytest.raises(ValueError, match="holds no synthetic streets"):
        contact_sheet(tmp_path)


@pytest.mark.long
def test_command_line(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "hkd_d2", "data", "streets", "--workers", "1"]
    command += ["--num-train", "1", "--num-val", "1", "--height", "96", "--width", "160"]
    command += ["--out", str(tmp_path / "streets"), "--preview", str(tmp_path / "sheet.png")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "streets: 2/2 pictures" in done.stdout
    assert cv2.imread(str(tmp_path / "sheet.png")) is not None
    done = subprocess.run(
        [*command, "--seed", "5"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and "other parameters (seed" in done.stderr
