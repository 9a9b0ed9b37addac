"""One interface to a detector in a file, whatever runs it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hkd_d2.inference.detections import Detections
from hkd_d2.inference.images import as_array, resize, resized_shape

BACKENDS = ("torch", "onnx")
# Which backend reads which file.
_BY_SUFFIX = {".pth": "torch", ".pkl": "torch", ".safetensors": "torch", ".onnx": "onnx"}
PROGRAMS = (".pt2", ".ts")  # torch as well, and only where the caller says so


class Detector(ABC):
    """A detector that was loaded from a file; :func:`load_detector` makes one.

    Several threads may call :meth:`detect` at once.

    Attributes:
        metadata (dict): what the file says of the detector. ``class_names`` (list[str]);
            ``kind`` (two-stage | one-stage); ``architecture``; ``input_format`` (RGB | BGR);
            ``pixel_mean`` and ``pixel_std`` (list of 3 floats in that order); ``min_size`` and
            ``max_size`` (resize rule, pixels); ``size_divisibility``; ``score_threshold``,
            ``nms_threshold``, ``max_detections``; ``version`` of this project; ``weights_sha256``.
            Of an exported file ``height``, ``width`` and ``batch`` too, None where they are free.
        batch_size (int): most images that run at once.
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
        """What runs for an image.

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


def load_detector(
    path: str | Path,
    backend: str | None = None,
    *,
    config_file: str | Path | None = None,
    device: str = "cpu",
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = 8,
    threads: int | None = None,
) -> Detector:
    """Load a detector from a file.

    Args:
        path: weights (.pth, .safetensors, a model zoo's .pkl) or an exported .onnx, .pt2 or .ts.
        backend: torch | onnx; None goes by the file's suffix. ``onnx`` needs neither PyTorch nor
            Detectron2. A .pt2 or .ts is a program, which may do anything: it is run for ``torch``
            alone, so load only what you wrote yourself.
        config_file: config of the weights; by default ``config.yaml`` beside them. Not read for
            exported files, which have all they need inside.
        device: cpu | cuda | cuda:N; a .pt2 or .ts runs on the CPU.
        score_threshold: only detections that score more; None for the file's own. An exported file
            was cut at its own threshold, and a lower one is refused.
        nms_threshold: IoU from which a box suppresses another of its class; None for the config's
            own. Fixed in an exported file.
        class_names: names of the classes; None for those of the config's first training set, or
            ``class_0`` and so on where that set is not known here. Inside an exported file.
        batch_size: most images that run at once, where their sizes agree.
        threads: threads that one call uses, for .onnx; None for the runtime's choice. PyTorch has
            one number for the whole process, ``torch.set_num_threads``.

    Returns:
        Detector: its :meth:`Detector.detect` may be called from several threads at once.

    Raises:
        FileNotFoundError: no such file, or no config beside it.
        ValueError: an unknown suffix or backend, a file that does not fit its config or was not
            written by this project, a threshold outside [0, 1] or fixed in the file.
        ImportError: what the backend needs is not installed.
    """
    path = Path(path)
    if backend is None:
        if path.suffix in PROGRAMS:
            raise ValueError(
                f"'{path}' is a program, which may do anything; take an .onnx, or give the backend "
                "'torch' if you wrote the file yourself."
            )
        if path.suffix not in _BY_SUFFIX:
            raise ValueError(
                f"'{path}' is none of {', '.join(_BY_SUFFIX)}; name the backend: "
                f"{' or '.join(BACKENDS)}."
            )
        backend = _BY_SUFFIX[path.suffix]
    if backend not in BACKENDS:
        raise ValueError(f"The backend is '{backend}'; choose from {', '.join(BACKENDS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; give an existing file.")
    check_thresholds(score_threshold=score_threshold, nms_threshold=nms_threshold)
    if threads is not None and backend != "onnx":
        raise ValueError("threads is for .onnx files; call torch.set_num_threads instead.")
    if backend == "onnx" or path.suffix in PROGRAMS:
        for name, value in (("nms_threshold", nms_threshold), ("class_names", class_names)):
            if value is not None:
                raise ValueError(f"{name} is fixed in '{path}'; give it when exporting.")
    if backend == "onnx":
        from hkd_d2.inference.onnx_backend import OnnxDetector

        return OnnxDetector(path, device, score_threshold, batch_size, threads)
    if path.suffix in PROGRAMS:
        from hkd_d2.inference.program_backend import ProgramDetector, load_program

        if device != "cpu":
            raise ValueError(f"The device is '{device}' and '{path}' runs on the CPU; use 'cpu'.")
        return ProgramDetector(path, *load_program(path), score_threshold, batch_size)
    from hkd_d2.inference.torch_backend import TorchDetector, build_detector

    model, metadata = build_detector(
        path,
        config_file,
        device=device,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        class_names=class_names,
    )
    return TorchDetector(model, metadata, batch_size)


def check_thresholds(**thresholds: float | None) -> None:
    """Raise ValueError for one that is given and not a number from 0 to 1."""
    for name, value in thresholds.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; give a number from 0 to 1.")
