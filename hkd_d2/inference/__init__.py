"""Run a detector from a file: weights by PyTorch, or an ONNX file without it."""

from hkd_d2.data.images import MAX_BYTES, MAX_PIXELS, read_image
from hkd_d2.inference.detections import Detections
from hkd_d2.inference.detector import Detector
from hkd_d2.inference.loading import load_detector

__all__ = ["MAX_BYTES", "MAX_PIXELS", "Detections", "Detector", "load_detector", "read_image"]
