"""Training and evaluation of students, alone or beside a teacher."""

import hkd_d2._requirements  # noqa: F401  isort: skip

from hkd_d2.engine.trainer import Trainer

__all__ = ["Trainer"]
