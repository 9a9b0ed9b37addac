"""Loaders of pedestrian data; importing this package registers the built-in data sets."""

from .citypersons import load_citypersons
from .coco import load_coco
from .register import check_records, register_builtin_datasets, register_dataset, register_datasets

__all__ = [
    "check_records",
    "load_citypersons",
    "load_coco",
    "register_builtin_datasets",
    "register_dataset",
    "register_datasets",
]

register_builtin_datasets()
