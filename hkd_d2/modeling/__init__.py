"""Detectors: the distilling meta-architecture, ignore-aware heads, backbones."""
