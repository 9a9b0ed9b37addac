"""Detectors: the distilling meta-architecture, ignore-aware heads, backbones."""

import hkd_d2._requirements  # noqa: F401  isort: skip
