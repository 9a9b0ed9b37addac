"""Matching against the miss rate's own, and where boxes are drawn."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from hkd_d2.evaluation import SETUPS, coco_ground_truth, evaluate_miss_rate
from hkd_d2.visualization import (
    Scene,
    compare_detections,
    draw_detections,
    make_scenes,
    match_detections,
)

NONE = np.zeros((0, 4))


def random_set(seed, images=40):
    """Crowded records and detections: many overlaps, heights in and out of every setup."""
    rng = np.random.default_rng(seed)
    records, detections = [], []
    for image in range(images):
        rows = []
        for _ in range(rng.integers(0, 7)):
            height = float(rng.uniform(30, 160))
            box = [*rng.uniform(0, 120, 2).tolist(), 0.41 * height, height]
            rows.append(
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": 0,
                    "ignore": int(rng.random() < 0.2),
                    "vis_ratio": float(rng.choice([0.4, 0.8, 1.0])),
                }
            )
            for _ in range(rng.integers(0, 4)):
                moved = (np.array(box) + rng.normal(0, 0.12 * height, 4)).clip(1).tolist()
                detections.append({"image_id": image, "category_id": 1, "bbox": moved})
        for _ in range(4):  # strays of any height
            stray = [*rng.uniform(0, 250, 2).tolist(), 20.0, float(rng.uniform(10, 120))]
            detections.append({"image_id": image, "category_id": 1, "bbox": stray})
        records.append(
            {
                "file_name": f"{image}.png",
                "image_id": image,
                "height": 300,
                "width": 300,
                "annotations": rows,
            }
        )
    for row, score in zip(detections, rng.random(len(detections)), strict=True):
        row["score"] = float(score)
    return records, detections


@pytest.mark.parametrize("setup", ["Reasonable", "All", "small"])
@pytest.mark.parametrize("min_score", [0.0, 0.5])
def test_scenes_count_as_the_miss_rate_does(setup, min_score):
    records, detections = random_set(seed=3)
    result = evaluate_miss_rate(coco_ground_truth(records), detections, [setup])[setup]
    scenes = make_scenes(records, {"one": detections}, SETUPS[setup], min_score)
    matches = [scene.matches("one") for scene in scenes]
    # The operating point of this threshold: the last whose score reaches it.
    last = int((result.scores >= min_score).sum()) - 1
    assert sum(len(scene.truth) for scene in scenes) == result.num_ground_truth > 0
    assert sum(m.false_alarm.sum() for m in matches) == round(result.fppi[last] * len(records))
    missed = sum((~m.found).sum() for m in matches)
    assert missed == round(result.miss[last] * result.num_ground_truth)
    assert sum(m.ignored.sum() for m in matches) > 0
    assert sum(m.hit.sum() for m in matches) == sum(m.found.sum() for m in matches) > 0


def test_matching_by_hand():
    truth = np.array([[0.0, 0, 10, 20], [30, 0, 40, 20]])
    ignore = np.array([[60.0, 0, 80, 20]])
    boxes = np.array(
        [
            [0.0, 0, 10, 15],  # 150 of 200: found
            [0, 0, 10, 20],  # better, but later: taken already
            [30, 0, 40, 9],  # 90 of 200 is too little
            [55, 0, 65, 20],  # half of it on the ignored box
            [54, 0, 64, 20],  # a little less than half
        ]
    )
    matches = match_detections(boxes, truth, ignore)
    assert matches.hit.tolist() == [True, False, False, False, False]
    assert matches.ignored.tolist() == [False, False, False, True, False]
    assert matches.false_alarm.tolist() == [False, True, True, False, True]
    assert matches.found.tolist() == [True, False]


def test_of_equal_overlaps_the_later_pedestrian_is_found():
    twins = np.array([[0.0, 0, 10, 20], [0, 0, 10, 20], [4, 0, 14, 20]])
    assert match_detections(twins[:1], twins, NONE).found.tolist() == [False, True, False]


def test_matching_of_nothing():
    matches = match_detections(NONE, np.array([[0.0, 0, 10, 20]]), NONE)
    assert matches.hit.shape == (0,) and matches.found.tolist() == [False]
    assert match_detections(np.array([[0.0, 0, 10, 20]]), NONE, NONE).false_alarm.tolist() == [True]


def styles(axes):
    return [(p.get_xy(), p.get_linestyle(), to_hex(p.get_edgecolor())) for p in axes.patches]


def test_boxes_are_drawn_by_what_became_of_them():
    axes = Figure().add_subplot()
    image = np.zeros((40, 100, 3), dtype=np.uint8)
    draw_detections(
        axes,
        image,
        np.array([[0.0, 0, 10, 20], [20, 0, 30, 20], [70, 0, 80, 20]]),
        truth=np.array([[0.0, 0, 10, 20], [50, 5, 60, 25]]),
        ignore=np.array([[70.0, 0, 80, 20]]),
        scores=[0.9, 0.8, 0.7],
    )
    # Ignored, missed, false alarm, found; the detection on the ignored box is not drawn. Half a
    # pixel less, since matplotlib's pixel centres are whole numbers.
    assert [(style[0], style[1]) for style in styles(axes)] == [
        ((69.5, -0.5), "--"),
        ((49.5, 4.5), ":"),
        ((19.5, -0.5), "-"),
        ((-0.5, -0.5), "-"),
    ]
    assert len({style[2] for style in styles(axes)}) == 4
    assert [text.get_text() for text in axes.texts] == ["0.90", "0.80", "0.70"]


def test_boxes_without_ground_truth_look_alike():
    axes = Figure().add_subplot()
    boxes = np.array([[0.0, 0, 10, 20], [20, 0, 30, 20]])
    draw_detections(axes, np.zeros((40, 100, 3), dtype=np.uint8), boxes)
    first, second = styles(axes)
    assert first[1:] == second[1:]


def test_comparison_puts_detectors_side_by_side(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: written.append(figure))
    Image.fromarray(np.full((40, 100, 3), 90, dtype=np.uint8)).save(tmp_path / "0.png")
    scene = Scene(
        file_name=str(tmp_path / "0.png"),
        truth=np.array([[0.0, 0, 10, 20]]),
        ignore=NONE,
        detections={"good": np.array([[0.0, 0, 10, 20]]), "bad": np.array([[50.0, 0, 60, 20]])},
    )
    compare_detections({"first": scene, "second": scene}, tmp_path / "picture.png", "Two rows")
    titles = [axes.get_title() for axes in written[0].axes]
    assert titles == [
        "ground truth\nto find 1",
        "good\nfound 1, false alarms 0",
        "bad\nfound 0, false alarms 1",
        "to find 1",
        "found 1, false alarms 0",
        "found 0, false alarms 1",
    ]
    assert [axes.get_ylabel() for axes in written[0].axes[::3]] == ["first", "second"]
    with pytest.raises(ValueError, match="at least one scene"):
        compare_detections({}, tmp_path / "picture.png", "none")


def test_comparison_shows_the_image(tmp_path):
    Image.fromarray(np.full((40, 100, 3), (200, 30, 30), dtype=np.uint8)).save(tmp_path / "0.png")
    scene = Scene(str(tmp_path / "0.png"), NONE, NONE, {"one": NONE})
    compare_detections({"only": scene}, tmp_path / "picture.png", "red")
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    share = (pixels == (200, 30, 30)).all(axis=-1).mean()
    assert share > 0.3  # RGB, and large: half of the picture is margin and legend
