"""Distillation terms: one file a method, found by the name in ``HKD.TERMS``.

Importing the package imports every module in it, so that a term's file registers the term.
"""

import hkd_d2._requirements  # noqa: F401  isort: skip

import importlib
import pkgutil

from hkd_d2.distillation.term import (
    TERM_REGISTRY,
    Term,
    add_term_configs,
    build_terms,
    find_terms,
)

__all__ = ["TERM_REGISTRY", "Term", "add_term_configs", "build_terms", "find_terms"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
