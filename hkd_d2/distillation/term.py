"""The base class of a distillation term, and the registry that finds terms by name."""

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from hkd_d2.distillation.detector_pass import DetectorPass, Targets
from hkd_d2.distillation.schedules import WeightSchedule, add_schedule
from hkd_d2.distillation.spec import DetectorSpec

TERM_REGISTRY = Registry("HKD_TERM")
TERM_REGISTRY.__doc__ = """
Distillation terms. ``HKD.TERMS`` names a class in lower case and ``HKD.<NAME>`` configures it; it
is built as ``cls(cfg, student, teacher)`` with two :class:`DetectorSpec`.
"""

# How deep a network has to go for what a term reads; each entry includes those before it in its
# own branch (predictions need hidden, hidden needs pooled).
FEATURES, PROPOSALS, DENSE = "features", "proposals", "dense"
POOLED, HIDDEN, PREDICTIONS = "pooled", "hidden", "predictions"
_TOWER_TAP = "tower_tap_"


def tower_tap(reused: int) -> str:
    """The need of what a one-stage head's towers have before their last ``reused`` convolutions."""
    return f"{_TOWER_TAP}{reused}"


def reused_convs(needs: frozenset) -> int | None:
    """The number in the :func:`tower_tap` among ``needs``, None where there is none."""
    taps = [int(x.removeprefix(_TOWER_TAP)) for x in needs if x.startswith(_TOWER_TAP)]
    return taps[0] if taps else None


class Term(nn.Module):
    """One distillation loss.

    A subclass is registered in :data:`TERM_REGISTRY`, reads the node ``cfg.HKD.<NAME>`` (at least
    ``WEIGHT`` and ``SCHEDULE``), says in :attr:`needs` what it reads of the teacher, and returns
    one unweighted scalar.

    Attributes:
        needs: of :data:`FEATURES`, :data:`PROPOSALS`, :data:`DENSE`,
            :data:`POOLED`, :data:`HIDDEN`, :data:`PREDICTIONS`, :func:`tower_tap`. Empty, on the
            class, for a term that reads no teacher. Whatever is read, the teacher's features are
            there.
        schedule: the term's weight over time.
    """

    needs: frozenset = frozenset({FEATURES})

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the term's keys, with their defaults, to its node ``HKD.<NAME>`` in place.

        A comment above an assignment describes its key. ``SCHEDULE`` is added to every term's node.
        """
        # Weight of the term.
        node.WEIGHT = 1.0

    def __init__(self, cfg: CfgNode):
        super().__init__()
        key = type(self).__name__.upper()
        self.schedule = WeightSchedule.from_config(cfg.HKD[key], cfg.SOLVER.MAX_ITER, key=key)

    def forward(
        self, student: DetectorPass, teacher: DetectorPass | None, targets: Targets
    ) -> torch.Tensor:
        """Return the unweighted loss, a float32 scalar."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict]:
        """Groups for the optimizer of parameters with settings of their own; here none."""
        return []

    def zero(self, like: torch.Tensor) -> torch.Tensor:
        """A loss of 0 for a batch without anything to compare.

        It depends on ``like`` and on every parameter of the term, since distributed training waits
        for a gradient of each.
        """
        return sum((0.0 * p.float().sum() for p in self.parameters()), like[:0].float().sum())


def add_term_configs(node: CfgNode) -> None:
    """Add the node of every registered term, with its defaults, to ``HKD`` in place.

    Raises:
        ValueError: a term's name is that of another node.
    """
    for name, cls in TERM_REGISTRY:
        key = name.upper()
        if key in node:
            raise ValueError(
                f"The term '{name}' of {cls.__module__} would have HKD.{key} for its config, which "
                "is something else's; rename the class."
            )
        node[key] = CfgNode()
        cls.add_config(node[key])
        add_schedule(node[key])


def find_terms(cfg: CfgNode) -> dict[str, type[Term]]:
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


def build_terms(cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec | None) -> nn.ModuleDict:
    """Build the terms that ``cfg.HKD.TERMS`` names, in that order.

    Raises:
        ValueError: by :func:`find_terms`, or a term that cannot serve this pair.
    """
    # A subclass takes the two specs, which the base class does not.
    build: dict[str, Callable[..., Term]] = dict(find_terms(cfg))
    return nn.ModuleDict({name: make(cfg, student, teacher) for name, make in build.items()})
