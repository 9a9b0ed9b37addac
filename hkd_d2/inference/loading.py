"""From a file to a detector: which backend runs it. Each is imported when it is needed."""

from collections.abc import Sequence
from pathlib import Path

from hkd_d2.inference.detector import BACKENDS, PROGRAMS, Detector, check_thresholds

# Which backend reads which file.
_BY_SUFFIX = {".pth": "torch", ".pkl": "torch", ".safetensors": "torch", ".onnx": "onnx"}


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
