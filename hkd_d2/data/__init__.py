"""Pedestrian data: loaders, the training convention and the mapper."""

import hkd_d2._requirements  # noqa: F401  isort: skip

from hkd_d2.data.mapper import PedestrianMapper, is_ignored, training_counts

__all__ = ["PedestrianMapper", "is_ignored", "training_counts"]
