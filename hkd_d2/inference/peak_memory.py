"""Peak memory of a process that does nothing but run one detector; started by models.py.

    python -m hkd_d2.inference.peak_memory '{"path": "student.onnx", "images": ["a.png"], ...}'

Prints JSON. An .onnx runs without PyTorch, so its process does not carry it.
"""

import json
import sys
from pathlib import Path

from hkd_d2.inference import load_detector


def main(path: str, images: list[str], threads: int, **options) -> dict:
    """Load a detector, run it three times on all images at once, and look at the peaks.

    Returns:
        dict: ``resident_bytes`` (peak resident memory of the process, None where the system does
        not tell) and ``gpu_bytes`` (peak of PyTorch's allocator, None without).
    """
    detector = load_for_timing(path, threads, **options)
    for _ in range(3):
        detector.detect(images)
    gpu = None
    if "torch" in sys.modules and options["device"].startswith("cuda"):
        import torch

        gpu = torch.cuda.max_memory_allocated()
    return {"resident_bytes": _peak_resident(), "gpu_bytes": gpu}


def load_for_timing(path: str, threads: int, **options):
    """A detector that computes with ``threads`` threads, whichever backend runs it."""
    if Path(path).suffix == ".onnx":
        return load_detector(path, threads=threads, **options)
    import torch

    torch.set_num_threads(threads)
    return load_detector(path, **options)


def _peak_resident():
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else None


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
