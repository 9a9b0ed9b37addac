"""Detections of an image."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections of one image, by falling score.

    Attributes:
        boxes: (R, 4) float32, XYXY in pixels of the image that was given.
        scores: (R,) float32 in [0, 1].
        classes: (R,) int64, indices into ``class_names``.
        class_names: all classes that the detector knows.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> "Detections":
        """Those that score more than ``threshold``."""
        keep = self.scores > threshold
        return replace(
            self, boxes=self.boxes[keep], scores=self.scores[keep], classes=self.classes[keep]
        )
