"""Base class of exported detectors: files that go from uint8 images to padded detections."""

from abc import abstractmethod
from pathlib import Path

import numpy as np

from hkd_d2.inference.detector import Detector

NEEDED = (
    *("class_names", "input_format", "pixel_mean", "min_size", "max_size", "score_threshold"),
    *("height", "width", "batch"),
)


class ExportedDetector(Detector):
    """A detector with normalisation, padding and post-processing in its file.

    Args:
        path: of the file, for sentences.
        metadata: see :class:`Detector`.
        score_threshold: not below that of the file.
        batch_size: most images that run at once; a file of fixed batch runs that.

    Raises:
        ValueError: metadata that lack something, or a lower threshold.
    """

    def __init__(
        self,
        path: str | Path,
        metadata: dict,
        score_threshold: float | None = None,
        batch_size: int = 8,
    ):
        check_metadata(path, metadata)
        threshold = metadata["score_threshold"]
        if score_threshold is not None and score_threshold < threshold:
            raise ValueError(
                f"'{path}' was exported with the score threshold {threshold} and cannot go below "
                "it; export it again with a lower one."
            )
        self.score_threshold = threshold if score_threshold is None else score_threshold
        metadata = metadata | {"score_threshold": self.score_threshold}
        super().__init__(metadata, metadata["batch"] or batch_size)

    def _run(self, batch):
        number = len(batch)
        if self.metadata["batch"]:
            batch = np.concatenate([batch, np.repeat(batch[-1:], self.batch_size - number, 0)])
        boxes, scores, classes, counts = self._outputs(batch)
        found = []
        for i in range(number):
            # Rows are by falling score, those after the count are filling.
            rows = slice(int((scores[i, : counts[i]] > self.score_threshold).sum()))
            found.append((boxes[i, rows], scores[i, rows], classes[i, rows]))
        return found

    @abstractmethod
    def _outputs(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """The four outputs, boxes (N, K, 4) to counts (N,), of uint8 (N, 3, H, W)."""


def check_metadata(path: str | Path, metadata: dict) -> None:
    """Raise ValueError where the metadata of a file are not those of an export."""
    if not isinstance(metadata, dict) or any(key not in metadata for key in NEEDED):
        raise ValueError(
            f"'{path}' does not say how it wants its images; export it with hkd export."
        )
    wrong = next((k for k, fits in _FITS.items() if k in metadata and not fits(metadata[k])), None)
    if wrong:
        raise ValueError(
            f"'{path}' has metadata that are none of ours, its {wrong} is "
            f"{repr(metadata[wrong])[:60]}; export it with hkd export."
        )


def _is_list(value, kind):
    return isinstance(value, list) and len(value) > 0 and all(isinstance(v, kind) for v in value)


def _is_size(value):
    return type(value) is int and 0 < value < 2**31


def _is_share(value):
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _is_size_or_free(value):
    return value is None or _is_size(value)


# What each entry of the metadata has to be, of those that are read again.
_FITS = {
    "class_names": lambda value: _is_list(value, str),
    "input_format": lambda value: value in ("RGB", "BGR"),
    "pixel_mean": lambda value: _is_list(value, (int, float)) and len(value) == 3,
    "min_size": lambda value: type(value) is int and 0 <= value < 2**31,  # 0: no resizing
    "max_size": _is_size,
    # Negative for all, as TEST.DETECTIONS_PER_IMAGE.
    "max_detections": lambda value: type(value) is int and value < 2**31 and value != 0,
    **dict.fromkeys(("score_threshold", "nms_threshold"), _is_share),
    **dict.fromkeys(("height", "width", "batch"), _is_size_or_free),
    "smallest": lambda value: type(value) is int and value >= 0,
}
