"""A file of a fixed size takes images of any proportions, filled up by the mean pixel."""

import numpy as np
import pytest

from helpers.rules import rule
from hkd_d2.data.images import resize
from hkd_d2.inference.exported import ExportedDetector, check_metadata

pytestmark = rule("A file of a fixed size takes pictures of any proportions")

METADATA = {
    "class_names": ["pedestrian"],
    "input_format": "BGR",
    "pixel_mean": [103.53, 116.28, 123.675],
    "min_size": 60,
    "max_size": 90,
    "score_threshold": 0.0,
    "height": 60,
    "width": 90,
    "batch": None,
}


class Boxes(ExportedDetector):
    """Finds the same boxes in every image; ``seen`` are the batches."""

    def __init__(self, boxes, **metadata):
        super().__init__("file", METADATA | metadata)
        self.boxes, self.seen = np.array(boxes, np.float32), []

    def _outputs(self, batch):
        self.seen.append(batch)
        n, k = len(batch), len(self.boxes)
        scores = np.broadcast_to(np.linspace(0.9, 0.5, k, dtype=np.float32), (n, k))
        boxes = np.broadcast_to(self.boxes, (n, k, 4))
        return boxes, scores, np.zeros((n, k), np.int64), np.full(n, k)


def noise(height, width):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


# (height, width) of the image, of the frame, and of the image in it
@pytest.mark.parametrize(
    "image, frame, resized",
    [
        ((120, 240), (60, 90), (45, 90)),  # too wide
        ((120, 130), (60, 90), (60, 65)),  # too narrow
        ((90, 60), (60, 90), (60, 40)),  # upright in a lying frame
        ((60, 90), (90, 60), (40, 60)),  # lying in an upright one
        ((50, 50), (60, 90), (60, 60)),
        ((90, 45), (60, 60), (60, 30)),
        ((30, 20), (90, 60), (90, 60)),
        ((120, 180), (60, 90), (60, 90)),
    ],
)
def test_an_image_fits_into_the_frame(image, frame, resized):
    detector = Boxes([[0, 0, 1, 1]], height=frame[0], width=frame[1])
    picture = noise(*image)
    detector.detect([picture])
    (batch,) = detector.seen
    assert batch.shape == (1, 3, *frame) and batch.dtype == np.uint8
    assert detector.input_shape(*image) == frame
    height, width = resized
    wanted = resize(picture, resized).transpose(2, 0, 1)[::-1]
    np.testing.assert_array_equal(batch[0, :, :height, :width], wanted)
    mean = np.array([104, 116, 124])[:, None]  # of the channels in the file's order
    for filled in (batch[0, :, height:], batch[0, :, :, width:]):
        assert (filled.reshape(3, -1) == mean).all()


def test_boxes_come_back_into_the_image():
    # 45 rows of 60 are the image, at half of its size.
    boxes = [[10, 20, 30, 40], [80, 30, 90, 60], [10, 46, 30, 60]]
    (found,) = Boxes(boxes).detect([noise(90, 180)])
    np.testing.assert_allclose(found.boxes, [[20, 40, 60, 80], [160, 60, 180, 90]])
    np.testing.assert_allclose(found.scores, [0.9, 0.7])


def test_images_of_all_proportions_run_together():
    detector = Boxes([[0, 0, 10, 10]])
    found = detector.detect([noise(90, 180), noise(60, 90), noise(180, 90)])
    assert [len(batch) for batch in detector.seen] == [3]
    sides = [f.boxes[0, 2] for f in found]
    np.testing.assert_allclose(sides, [20, 10, 30])


def test_a_free_size_fills_nothing_up():
    detector = Boxes([[0, 0, 10, 10]], height=None, width=None)
    detector.detect([noise(90, 180)])
    assert detector.seen[0].shape == (1, 3, 45, 90) and detector.input_shape(90, 180) == (45, 90)


@pytest.mark.parametrize(
    "entry, value",
    [
        *(("class_names", value) for value in ("text", [], [1], None)),
        *(("pixel_mean", value) for value in ([1, 2], "abc", [1, 2, "3"], None)),
        *(("min_size", value) for value in (-1, "3", 2.5, [3], True)),
        *(("score_threshold", value) for value in (float("nan"), 2, "0.5", None)),
        *(("height", value) for value in (0, "64", [64])),
        ("input_format", ["RGB"]),
        ("smallest", None),
    ],
)
def test_metadata_of_another_kind(entry, value):
    whole = {
        "class_names": ["pedestrian"],
        "input_format": "BGR",
        "pixel_mean": [1, 2.5, 3],
        "min_size": 64,
        "max_size": 96,
        "score_threshold": 0.05,
        "height": None,
        "width": None,
        "batch": 1,
    }
    check_metadata("a.onnx", whole)
    check_metadata("a.onnx", whole | {"min_size": 0, "max_detections": -1})  # no resizing, no cap
    with pytest.raises(ValueError, match=f"'a.onnx' has metadata .* its {entry} is"):
        check_metadata("a.onnx", whole | {entry: value})
