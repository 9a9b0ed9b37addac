"""The base class of a distillation term, the registry, and what a term knows at construction."""

from dataclasses import dataclass

import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn

from hkd_d2.distillation.detector_pass import DetectorPass, Targets
from hkd_d2.distillation.schedules import WeightSchedule

TERM_REGISTRY = Registry("HKD_TERM")
TERM_REGISTRY.__doc__ = """
Distillation terms. ``HKD.TERMS`` names a class in lower case and ``HKD.<NAME>`` configures it; it
is built as ``cls(cfg, student, teacher)`` with two :class:`DetectorSpec`.
"""

# How deep a network has to go for what a term reads; each entry includes those before it in its
# own branch (predictions need hidden, hidden needs pooled).
FEATURES, PROPOSALS, DENSE = "features", "proposals", "dense"
POOLED, HIDDEN, PREDICTIONS = "pooled", "hidden", "predictions"


@dataclass
class DetectorSpec:
    """The shapes of a detector that terms build themselves from.

    Attributes:
        levels (dict[str, ShapeSpec]): channels and stride of each feature level.
        roi_levels (list[str]): the levels that the box pooler reads, finest first.
        pooler_resolution (int): P of the (R, C, P, P) pooled features.
        hidden_channels (int): D of the (R, D) hidden box features.
        num_classes (int): classes without background.
        class_agnostic_deltas (bool): deltas are (R, 4) instead of (R, 4 K).
        delta_weights (tuple[float]): Detectron2's ``Box2BoxTransform`` weights of the box branch.
    """

    levels: dict[str, ShapeSpec]
    roi_levels: list[str]
    pooler_resolution: int
    hidden_channels: int
    num_classes: int
    class_agnostic_deltas: bool
    delta_weights: tuple[float, ...]

    def level_at(self, stride: int) -> str | None:
        """Name of the level with ``stride`` pixels a cell, None where there is none."""
        return next((name for name, spec in self.levels.items() if spec.stride == stride), None)


def one_of(key: str, value: str, known: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``known``; a ValueError names the config key otherwise."""
    if value not in known:
        raise ValueError(f"{key} is '{value}'; choose from {', '.join(known)}.")
    return value


class Term(nn.Module):
    """One distillation loss.

    A subclass is registered in :data:`TERM_REGISTRY`, reads the node ``cfg.HKD.<NAME>`` (at least
    ``WEIGHT`` and ``SCHEDULE``), says in :attr:`needs` what it reads of the teacher, and returns
    one unweighted scalar.

    Attributes:
        needs (frozenset[str]): of :data:`FEATURES`, :data:`PROPOSALS`, :data:`DENSE`,
            :data:`POOLED`, :data:`HIDDEN`, :data:`PREDICTIONS`. Empty, on the class, for a term
            that reads no teacher. Whatever is read, the teacher's features are there.
        schedule (WeightSchedule): the term's weight over time.
    """

    needs: frozenset = frozenset({FEATURES})

    def __init__(self, cfg):
        super().__init__()
        key = type(self).__name__.upper()
        self.schedule = WeightSchedule.from_config(cfg.HKD[key], cfg.SOLVER.MAX_ITER, key=key)

    def forward(
        self, student: DetectorPass, teacher: DetectorPass | None, targets: Targets
    ) -> torch.Tensor:
        """Return the unweighted loss, a float32 scalar."""
        raise NotImplementedError

    def zero(self, like: torch.Tensor) -> torch.Tensor:
        """A loss of 0 for a batch without anything to compare.

        It depends on ``like`` and on every parameter of the term, since distributed training waits
        for a gradient of each.
        """
        return sum((0.0 * p.float().sum() for p in self.parameters()), like[:0].float().sum())


def find_terms(cfg) -> dict[str, type[Term]]:
    """The classes that ``cfg.HKD.TERMS`` names, in that order.

    Raises:
        ValueError: an unknown name, or a name that stands twice.
    """
    known = {name.lower(): cls for name, cls in TERM_REGISTRY}
    found = {}
    for name in cfg.HKD.TERMS:
        if name not in known:
            raise ValueError(
                f"HKD.TERMS names '{name}', which is not a distillation term; "
                f"choose from {', '.join(sorted(known))}."
            )
        if name in found:
            raise ValueError(f"HKD.TERMS names '{name}' twice; keep one of them.")
        found[name] = known[name]
    return found


def build_terms(cfg, student: DetectorSpec, teacher: DetectorSpec | None) -> nn.ModuleDict:
    """Build the terms that ``cfg.HKD.TERMS`` names, in that order.

    Raises:
        ValueError: by :func:`find_terms`, or a term that cannot serve this pair.
    """
    return nn.ModuleDict({n: cls(cfg, student, teacher) for n, cls in find_terms(cfg).items()})
