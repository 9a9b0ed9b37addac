"""A detector that ``hkd export`` wrote, run by onnxruntime: no PyTorch, no Detectron2."""

import json
from pathlib import Path

from hkd_d2.inference.exported import ExportedDetector

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


class OnnxDetector(ExportedDetector):
    """Runs an ONNX file of ``hkd export``.

    A session of onnxruntime may be run from several threads at once.

    Args:
        path, score_threshold, batch_size: see :class:`ExportedDetector`.
        device: cpu | cuda | cuda:N; the latter two need onnxruntime-gpu.
        threads: threads of one operator.

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
        options.log_severity_level = 4  # fatal; errors are raised as well
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
                f"'{path}' cannot be read as ONNX ({reason}); export it again with hkd export."
            ) from error
        metadata = read_metadata(self.session.get_modelmeta().custom_metadata_map)
        # What the graph takes counts: a dimension is a number where it is fixed, else a name.
        taken = self.session.get_inputs()[0].shape
        for key, size in zip(("batch", "", "height", "width"), taken, strict=True):
            if key:
                metadata[key] = size if isinstance(size, int) else None
        super().__init__(path, metadata, score_threshold, batch_size)

    def _outputs(self, batch):
        return self.session.run(None, {"images": batch})


def read_metadata(properties: dict[str, str]) -> dict:
    """Metadata of a detector from the strings of an ONNX file; keys that are not ours stay out."""
    metadata = {}
    for key, value in properties.items():
        try:
            metadata[key] = value if key in PLAIN else json.loads(value)
        except (ValueError, RecursionError):  # nested without end
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
