"""A detector that needs no weights: it finds the red pixels of an image."""

import cv2
import numpy as np

from hkd_d2.data.images import as_array
from hkd_d2.inference import Detections, Detector


class RedDetector(Detector):
    """One box around all red pixels, of score ``score``; none where nothing is red.

    ``images`` are the arrays that it was shown.
    """

    def __init__(self, score=0.9, class_names=("pedestrian",), batch_size=8):
        super().__init__({"class_names": list(class_names)}, batch_size)
        self.score, self.images = score, []

    def detect(self, images):
        self.images += images
        return [self._find(as_array(image)) for image in images]

    def _find(self, image):
        rows, columns = np.nonzero((image[..., 0] > 150) & (image[..., 1:] < 100).all(axis=-1))
        boxes = np.zeros((0, 4), dtype=np.float32)
        if len(rows):
            edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            boxes = np.array([edges], dtype=np.float32)
        return Detections(
            boxes,
            np.full(len(boxes), self.score, dtype=np.float32),
            np.full(len(boxes), len(self.class_names) - 1),
            self.class_names,
        )

    def _run(self, batch):
        raise NotImplementedError


def street(x=40, y=20, size=(96, 128), width=20, height=50):
    """(H, W, 3) uint8 RGB: a red pedestrian on grey."""
    image = np.full((*size, 3), 60, dtype=np.uint8)
    image[y : y + height, x : x + width] = (220, 20, 30)
    return image


def write_video(path, frames=12, size=(96, 128), fps=10):
    """Frame k is a grey street whose pedestrian is k pixels further to the right."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, size[::-1])
    assert writer.isOpened()
    for k in range(frames):
        writer.write(street(x=20 + k, size=size)[..., ::-1].copy())
    writer.release()
