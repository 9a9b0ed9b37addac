"""Run a detector from a file: weights by PyTorch, or an ONNX file without it."""

from hkd_d2.inference.detections import Detections
from hkd_d2.inference.detector import Detector, load_detector
from hkd_d2.inference.images import MAX_BYTES, MAX_PIXELS, read_image

__all__ = ["MAX_BYTES", "MAX_PIXELS", "Detections", "Detector", "load_detector", "read_image"]
