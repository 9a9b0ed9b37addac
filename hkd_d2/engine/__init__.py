"""Training and evaluation of students, alone or beside a teacher."""

from hkd_d2.engine.trainer import Trainer, evaluate

__all__ = ["Trainer", "evaluate"]
