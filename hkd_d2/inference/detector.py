"""The interface to a detector in a file, whatever runs it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hkd_d2.data.images import as_array, resize, resized_shape
from hkd_d2.inference.detections import Detections

BACKENDS = ("torch", "onnx")
PROGRAMS = (".pt2", ".ts")  # suffixes that torch runs as well, and only where the caller says so


class Detector(ABC):
    """A detector that was loaded from a file; :func:`hkd_d2.load_detector` makes one.

    Several threads may call :meth:`detect` at once.

    Attributes:
        metadata: what the file says of the detector. ``class_names`` (list[str]);
            ``kind`` (two-stage | one-stage); ``architecture``; ``input_format`` (RGB | BGR);
            ``pixel_mean`` and ``pixel_std`` (list of 3 floats in that order); ``min_size`` and
            ``max_size`` (resize rule, pixels); ``size_divisibility``; ``score_threshold``,
            ``nms_threshold``, ``max_detections``; ``version`` of this project; ``weights_sha256``.
            Of an exported file ``height``, ``width`` and ``batch`` too, None where they are free.
        batch_size: most images that run at once.
    """

    def __init__(self, metadata: dict, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more.")
        self.metadata = metadata
        self.batch_size = batch_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by index."""
        return tuple(self.metadata["class_names"])

    def detect(self, images: Sequence) -> list[Detections]:
        """Find the objects of each image.

        Images that have one size after resizing run together, so that what is found in an image
        does not depend on what else is in the list. Where the file has a fixed size, an image of
        other proportions is resized by the rule until it fits, and filled up on the right and
        below by the mean pixel, rounded.

        Args:
            images: uint8 RGB arrays (H, W, 3), PIL images, or paths (str or Path) of images; their
                sizes may differ.

        Returns:
            list[Detections]: in the order of the images, boxes in pixels of each image.

        Raises:
            FileNotFoundError: a path without a file.
            ValueError: an image that cannot be read or is of another form; not a list.
        """
        if isinstance(images, (str, Path, bytes)) or getattr(images, "ndim", 4) == 3:
            raise ValueError("detect takes a list of images; put the one image into a list.")
        arrays = [as_array(image) for image in images]
        inputs = [self.input_shape(*array.shape[:2]) for array in arrays]
        found: list[Detections | None] = [None] * len(arrays)
        for shape in dict.fromkeys(inputs):
            members = [i for i, s in enumerate(inputs) if s == shape]
            for start in range(0, len(members), self.batch_size):
                rows = members[start : start + self.batch_size]
                batch = np.stack([self.prepare(arrays[i]) for i in rows])
                for i, result in zip(rows, self._run(batch), strict=True):
                    original = arrays[i].shape[:2]
                    found[i] = self._restore(result, self._resized_shape(*original), original)
        return found

    def input_shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what runs for an image of this height and width.

        Raises:
            ValueError: see :func:`resized_shape`.
        """
        resized = self._resized_shape(height, width)
        return self._fixed_shape() or resized

    def _fixed_shape(self):
        height, width = self.metadata.get("height"), self.metadata.get("width")
        return (height, width) if height and width else None

    def _resized_shape(self, height, width):
        """Of the image alone, without what is filled up."""
        if fixed := self._fixed_shape():
            # The rule whose longest side is that of the frame into which the image has to fit.
            return resized_shape(height, width, min(fixed), fixed[height <= width])
        return resized_shape(height, width, self.metadata["min_size"], self.metadata["max_size"])

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The network's input for an image.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            ndarray: uint8 (3, h, w), (h, w) being its :meth:`input_shape`, in the detector's
                channel order.
        """
        resized, shape = self._resized_shape(*image.shape[:2]), self.input_shape(*image.shape[:2])
        planes = resize(image, resized).transpose(2, 0, 1)
        if self.metadata["input_format"] == "BGR":
            planes = planes[::-1]
        if resized == shape:
            return planes
        # Detectron2 pads by zeros after normalisation; the nearest pixel before it is the mean.
        mean = np.rint(self.metadata["pixel_mean"]).clip(0, 255).astype(np.uint8)
        filled = np.empty((3, *shape), np.uint8)
        filled[:] = mean[:, None, None]
        filled[:, : resized[0], : resized[1]] = planes
        return filled

    @abstractmethod
    def _run(self, batch: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Boxes, scores and classes, in pixels of the batch, of uint8 (N, 3, H, W)."""

    def _restore(self, result, shape, original):
        """Boxes in the original image's pixels, those without area dropped, as in Detectron2."""
        boxes, scores, classes = result
        (height, width), (original_height, original_width) = shape, original
        boxes = boxes.astype(np.float32, copy=True)
        boxes[:, 0::2] *= original_width / width
        boxes[:, 1::2] *= original_height / height
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, original_width)
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, original_height)
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return Detections(boxes[keep], scores[keep], classes[keep], self.class_names)


def check_thresholds(**thresholds: float | None) -> None:
    """Raise ValueError for one that is given and not a number from 0 to 1."""
    for name, value in thresholds.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; give a number from 0 to 1.")
