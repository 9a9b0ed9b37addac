"""Boxes lie where the detector found them, and panels side by side."""

import numpy as np
import pytest

from helpers.red_detector import RedDetector, street
from hkd_d2.inference import Detections
from hkd_d2.inference.drawing import COLOURS, GAP, draw_boxes, draw_side_by_side


def detections(*boxes, names=("pedestrian",), classes=None):
    return Detections(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.linspace(0.9, 0.5, len(boxes), dtype=np.float32),
        np.array(classes or [0] * len(boxes), dtype=np.int64),
        names,
    )


def colour(label):
    return tuple(bytes.fromhex(COLOURS[label][1:]))


def where(image, rgb):
    return (image == rgb).all(axis=-1)


def test_a_boxs_line_lies_inside_its_edges():
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    drawn = draw_boxes(image, detections([100, 120, 180, 260]))
    line = where(drawn, colour(0))
    # Columns 100 and 179 are the first and the last that the box covers, rows 120 and 259.
    assert line[120:260, 100].all() and line[120:260, 179].all()
    assert line[120, 100:180].all() and line[259, 100:180].all()
    assert not line[120:, 99].any() and not line[120:, 180].any() and not line[260].any()
    assert not line[140:240, 105:175].any()
    assert line[105:119, 100:110].any()  # the score's plate, above
    assert not image.any()  # the image itself is as it was


@pytest.mark.parametrize("box", [[0, 0, 40, 60], [380, 270, 400, 300], [10, 10, 10.2, 10.2]])
def test_boxes_at_the_border_and_tiny_ones_are_drawn(box):
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    drawn = draw_boxes(image, detections(box))
    assert drawn.shape == image.shape and where(drawn, colour(0)).any()


def test_classes_have_colours_and_names():
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    boxes = [[20, 50, 60, 100], [220, 50, 260, 100]]
    one = draw_boxes(image, detections(*boxes))
    two = draw_boxes(image, detections(*boxes, names=("rider", "walker"), classes=[0, 1]))
    assert where(two, colour(0))[:, :200].any() and not where(two, colour(0))[:, 200:].any()
    assert where(two, colour(1))[:, 200:].any()
    # The plate with a name is longer than that with the score alone.
    assert where(two, colour(0)).sum() > where(one[:, :200], colour(0)).sum()


def test_panels_side_by_side():
    image = street()
    found = RedDetector().detect([image])[0]
    drawn = draw_side_by_side(image, {"teacher": found, "student": found.above(0.95)})
    height, width = image.shape[:2]
    bar = drawn.shape[0] - height
    assert drawn.shape[1] == 2 * width + GAP and bar > 10
    np.testing.assert_array_equal(drawn[bar:, :width], draw_boxes(image, found))
    np.testing.assert_array_equal(drawn[bar:, width + GAP :], image)
    for panel in (drawn[:bar, :width], drawn[:bar, width + GAP :]):
        assert panel.min() < 100 < panel.mean()  # a dark name on white
    np.testing.assert_array_equal(
        draw_side_by_side(image, {"alone": found}), draw_boxes(image, found)
    )
