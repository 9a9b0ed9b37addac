"""Crops of objects and background: their squares by hand, no row in the background, the tool."""

import json

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from helpers.rules import rule
from hkd_d2.cli.dispatch import run_command
from hkd_d2.data.crops import Crop, cut, overlap, plan_crops, write_crops

pytestmark = rule(
    "No annotated row is in a crop of the background, and crops depend on the seed alone"
)

OPTIONS = {
    "min_height": 20,
    "min_visibility": 0.0,
    "context": 0.1,
    "background": 1.0,
    "seed": 0,
}


def record(*boxes, size=(100, 200), **flags):
    """A record of (height, width); boxes [x, y, w, h], those after an Ellipsis ignored."""
    rows, ignore = [], 0
    for box in boxes:
        if box is ...:
            ignore = 1
            continue
        row = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "ignore": ignore}
        rows.append({**row, **flags})
    return {"file_name": "none", "height": size[0], "width": size[1], "annotations": rows}


def test_squares_of_objects_by_hand():
    """40 high and 10 % on either side: 48; its middle is the box's, (25, 40)."""
    records = [
        record([20.0, 20, 10, 40], [60.0, 10, 10, 19]),  # the second is too low to count
        record(..., [0.0, 0, 30, 60]),
        record([0.0, 0, 60, 30]),
    ]
    crops = plan_crops(records, ["pedestrian"], **{**OPTIONS, "background": 0.0})
    assert crops == [Crop(0, 1, 16, 48, "pedestrian"), Crop(2, -6, -21, 72, "pedestrian")]


def test_overlap_counts_the_smaller_of_both():
    crop = Crop(0, 10, 10, 20, "background")
    rows = np.array([[0.0, 0, 100, 100]])
    assert overlap(crop, rows) == 1.0  # inside a crowd, of which it is a 25th
    assert overlap(crop, np.array([[12.0, 12, 4, 8]])) == 1.0  # a small person inside
    assert overlap(crop, np.array([[25.0, 0, 10, 40]])) == pytest.approx(5 * 20 / 400)
    assert overlap(crop, np.array([[30.0, 0, 10, 40], [0, 0, 0, 9]])) == 0.0
    assert overlap(crop, np.zeros((0, 4))) == 0.0


def test_background_avoids_every_row_and_has_the_objects_sizes():
    records = [
        record([10.0, 10, 10, 20], ..., [60.0, 0, 140, 100]),
        record([150.0, 50, 20, 50]),
        record(..., [0.0, 0, 200, 100]),  # all of it to be ignored
        record(),
    ]
    crops = plan_crops(records, ["pedestrian"], **{**OPTIONS, "background": 100.0})
    found = [crop for crop in crops if crop.label == "background"]
    assert len(found) == 200
    assert {crop.side for crop in found} == {24, 60}
    assert {crop.image for crop in found} == {0, 1, 3}
    assert [crop.image for crop in crops] == sorted(crop.image for crop in crops)
    for crop in found:
        # The object's box lies in the image: a fifth of it, 12 of 60, is context, rounded.
        margin = crop.side / 12 + 1
        assert -margin <= crop.y and crop.y + crop.side <= 100 + margin
        if crop.image == 0:
            seen = np.zeros((300, 400), bool)
            seen[100 + crop.y :, 100 + crop.x :][: crop.side, : crop.side] = True
            for x, y, w, h in ((10, 10, 10, 20), (60, 0, 140, 100)):
                common = seen[100 + y : 100 + y + h, 100 + x : 100 + x + w].sum()
                assert common <= 0.1 * min(w * h, crop.side**2)


def test_the_seed_alone_moves_the_background():
    records = [record([10.0, 10, 10, 20]), record()]
    first, again, other = (
        plan_crops(records, ["pedestrian"], **{**OPTIONS, "background": 5.0, "seed": seed})
        for seed in (3, 3, 4)
    )
    assert first == again != other
    assert first[0] == other[0]


@pytest.mark.parametrize(
    "records, classes, sentence",
    [
        ([record(..., [0.0, 0, 10, 40])], ["person"], "no object of the class 'person' counts"),
        ([record([0.0, 0, 10, 40])], ["car", "person"], "no object of the class 'person' counts"),
        ([record([0.0, 0, 10, 40])], ["background"], "A class is named 'background'"),
        ([record([0.0, 0, 190, 100])], ["person"], "in 1000 tries no place for a background crop"),
        ([record([0.0, 0, 10, 150])], ["person"], "in 1000 tries no place"),  # none so high fits
    ],
)
def test_what_cannot_be_planned(records, classes, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan_crops(records, classes, **OPTIONS)


def test_the_border_is_repeated_and_large_crops_shrink():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    found = np.asarray(cut(image, Crop(0, -1, -1, 4, ""), 8))
    a, b, c, d, e, f = image.reshape(6, 3)
    assert np.array_equal(found, [[a, a, b, c], [a, a, b, c], [d, d, e, f], [d, d, e, f]])
    image = np.full((40, 40, 3), 7, np.uint8)
    assert cut(image, Crop(0, 0, 0, 40, ""), 16).size == (16, 16)


@pytest.fixture
def dataset(tmp_path):
    """COCO files of three images for train and two for val, options that register them."""
    rng = np.random.default_rng(0)
    entries = []
    for split, number in (("train", 3), ("val", 2)):
        folder = tmp_path / split
        folder.mkdir()
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
        for i in range(1, number + 1):
            pixels = rng.integers(0, 256, (120, 200, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            content["images"].append(
                {"id": i, "file_name": f"{i}.png", "height": 120, "width": 200}
            )
            content["annotations"].append(
                {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "bbox": [10, 20, 30, 80]}
            )
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        name = f"{tmp_path.name}_{split}"
        entries.append([name, "coco", str(tmp_path / f"{split}.json"), str(folder)])
    names = [entry[0] for entry in entries]
    return ["--train", names[0], "--val", names[1]], ["HKD.DATA.REGISTER", str(entries)]


def run(dataset, out, *arguments):
    return run_command("data crop", [*dataset[0], "--out", str(out), *arguments, *dataset[1]])


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_tool_writes_what_pretraining_reads_twice_alike(dataset, tmp_path, capsys):
    from hkd_d2.pretraining.images import open_images

    run(dataset, tmp_path / "a", "--background", "2", "--size", "64")
    assert "a/train: 3 person, 6 background" in capsys.readouterr().out
    (tmp_path / "b").mkdir()
    run(dataset, tmp_path / "b", "--background", "2", "--size", "64")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for train, number in ((True, 9), (False, 6)):
        images = open_images("folder", str(tmp_path / "a"), 32, train)
        assert images.classes == ["background", "person"] and len(images) == number
        assert images[0][0].shape == (3, 32, 32)
    # 80 high: a square of 96 around (25, 60), made smaller to 64. Its first row is row 12.
    found = np.asarray(Image.open(tmp_path / "a/train/person/000000_0000000.png"))
    source = np.asarray(Image.open(tmp_path / "train/1.png"))
    columns = np.arange(25 - 48, 25 + 48).clip(0)
    expected = Image.fromarray(source[12:108][:, columns]).resize((64, 64), Image.BILINEAR)
    assert np.array_equal(found, np.asarray(expected))


def test_the_command_refuses(dataset, tmp_path, capsys):
    def refused(words, *arguments, folder="a"):
        assert run(words, tmp_path / folder, *arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    said = refused(dataset, folder="full")
    assert "full' is there already; name a folder that is empty" in said
    assert files(tmp_path / "full") == {"mine.txt": b"mine"}
    assert "There is no data set for train; name one" in refused(([], dataset[1]))
    assert "'nowhere' is not registered" in refused((["--train", "nowhere"], []))
    assert "no.yaml' is neither in" in refused(dataset, "--config-file", "no.yaml")
    assert "--size is 2; give at least 8" in refused(dataset, "--size", "2")
    (tmp_path / "val" / "2.png").write_text("no picture")
    assert "2.png' cannot be read" in refused(dataset)
    assert not (tmp_path / "a").exists()


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def stop(file):
        raise KeyboardInterrupt

    monkeypatch.setattr("hkd_d2.data.crops.read_data_image", stop)
    with pytest.raises(KeyboardInterrupt):
        write_crops(tmp_path / "a", {"train": ([record()], [Crop(0, 0, 0, 9, "x")])}, 8)
    assert list(tmp_path.iterdir()) == []
