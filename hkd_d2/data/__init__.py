"""Pedestrian data: loaders, the training convention and the mapper."""

from .mapper import PedestrianMapper, is_ignored, training_counts

__all__ = ["PedestrianMapper", "is_ignored", "training_counts"]
