"""Loaders of pedestrian data; importing this package registers the built-in data sets."""

import hkd_d2._requirements  # noqa: F401  isort: skip

from hkd_d2.data.datasets.citypersons import load_citypersons
from hkd_d2.data.datasets.coco import load_coco
from hkd_d2.data.datasets.register import (
    check_records,
    register_builtin_datasets,
    register_dataset,
    register_datasets,
    register_unnamed,
)

__all__ = [
    "check_records",
    "load_citypersons",
    "load_coco",
    "register_builtin_datasets",
    "register_dataset",
    "register_datasets",
    "register_unnamed",
]

register_builtin_datasets()
