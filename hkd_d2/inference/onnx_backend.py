"""A detector that ``tools/export.py`` wrote, run by onnxruntime: no PyTorch, no Detectron2."""

import json
from pathlib import Path

import numpy as np

from .detector import Detector

try:
    import onnxruntime
except ModuleNotFoundError as error:
    if error.name != "onnxruntime":
        raise
    raise ImportError(
        "ONNX files need onnxruntime, which is not installed; install it with: "
        "pip install onnxruntime"
    ) from None

# Values of an ONNX file's metadata are strings: these as they are, the others as JSON.
PLAIN = ("kind", "architecture", "input_format", "input_layout", "version", "weights_sha256")
NEEDED = ("class_names", "input_format", "min_size", "max_size", "score_threshold")


class OnnxDetector(Detector):
    """Runs an exported detector: normalisation, padding and post-processing are in the graph.

    A session of onnxruntime may be run from several threads at once.

    Args:
        path (Path): an ``.onnx`` of ``tools/export.py``.
        device (str): cpu | cuda | cuda:N; the latter two need onnxruntime-gpu.
        score_threshold (float or None): not below that of the file.
        batch_size (int): most images that run at once; a graph of fixed batch runs that.
        threads (int or None): threads of one operator.

    Raises:
        ValueError: a file that is no such export, a lower threshold, or a device that the
            installed onnxruntime does not know.
    """

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        score_threshold: float | None = None,
        batch_size: int = 8,
        threads: int | None = None,
    ):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=_providers(device)
            )
        except ValueError:
            raise
        except Exception as error:  # onnxruntime's own kinds, some of them plain RuntimeErrors
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"'{path}' cannot be read as ONNX ({reason}); export it again with tools/export.py."
            ) from error
        metadata = read_metadata(self.session.get_modelmeta().custom_metadata_map)
        if any(key not in metadata for key in NEEDED):
            raise ValueError(
                f"'{path}' does not say how it wants its images; export it with tools/export.py."
            )
        super().__init__(metadata, batch_size)
        threshold = metadata["score_threshold"]
        if score_threshold is not None and score_threshold < threshold:
            raise ValueError(
                f"'{path}' was exported with the score threshold {threshold} and cannot go below "
                "it; export it again with a lower one."
            )
        self.score_threshold = threshold if score_threshold is None else score_threshold
        metadata["score_threshold"] = self.score_threshold
        # A dimension is a number where it is fixed and a name where it is not.
        images, _, height, width = self.session.get_inputs()[0].shape
        self.fixed_batch = images if isinstance(images, int) else None
        self.fixed_shape = (height, width) if isinstance(height, int) else None
        if self.fixed_batch is not None:
            self.batch_size = self.fixed_batch

    def _run(self, batch):
        if self.fixed_shape is not None and batch.shape[2:] != self.fixed_shape:
            (height, width), (wanted_height, wanted_width) = batch.shape[2:], self.fixed_shape
            raise ValueError(
                f"The detector was exported for images of {wanted_width}x{wanted_height} after "
                f"resizing, and this one is {width}x{height}; export it with dynamic sizes."
            )
        number = len(batch)
        if self.fixed_batch is not None and number < self.fixed_batch:
            batch = np.concatenate([batch, np.repeat(batch[-1:], self.fixed_batch - number, 0)])
        boxes, scores, classes, counts = self.session.run(None, {"images": batch})
        found = []
        for i in range(number):
            # Rows are by falling score, those after the count are filling.
            rows = slice(int((scores[i, : counts[i]] > self.score_threshold).sum()))
            found.append((boxes[i, rows], scores[i, rows], classes[i, rows]))
        return found


def read_metadata(properties: dict[str, str]) -> dict:
    """Metadata of a detector from the strings of an ONNX file; keys that are not ours stay out."""
    metadata = {}
    for key, value in properties.items():
        try:
            metadata[key] = value if key in PLAIN else json.loads(value)
        except ValueError:
            continue
    return metadata


def write_metadata(metadata: dict) -> dict[str, str]:
    """The reverse of :func:`read_metadata`."""
    return {k: v if k in PLAIN else json.dumps(v) for k, v in metadata.items()}


def _providers(device):
    if device == "cpu":
        return ["CPUExecutionProvider"]
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise ValueError(f"The device is '{device}'; choose from cpu, cuda and cuda:N.")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ValueError(
            f"The device is '{device}' and the installed onnxruntime runs on the CPU alone; "
            "install onnxruntime-gpu or use 'cpu'."
        )
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)})]
