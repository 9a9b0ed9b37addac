"""Run a detector from a file: weights by PyTorch, or an ONNX file without it."""

from .detections import Detections
from .detector import Detector, load_detector
from .images import MAX_BYTES, MAX_PIXELS, read_image

__all__ = ["MAX_BYTES", "MAX_PIXELS", "Detections", "Detector", "load_detector", "read_image"]
