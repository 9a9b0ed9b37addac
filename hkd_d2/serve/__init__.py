"""A detector as an HTTP service: ``python -m hkd_d2.serve --model student.onnx``."""
