"""Distillation terms: one file a method, found by the name in ``HKD.TERMS``."""

import hkd_d2._requirements  # noqa: F401  isort: skip

from hkd_d2.distillation.term import TERM_REGISTRY, Term, build_terms, find_terms

__all__ = ["TERM_REGISTRY", "Term", "build_terms", "find_terms"]
