"""The weight of a term over the iterations of a run."""

import math
from dataclasses import dataclass

from detectron2.config import CfgNode

DECAYS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class WeightSchedule:
    """Linear warm-up from 0, then constant or a decay to ``weight * end_factor``, then off.

    Attributes:
        weight: the full weight, >= 0.
        max_iter: iteration at which a decay ends, the length of the run.
        warmup_iters: of the warm-up; iteration 0 has 1 / warmup_iters of the weight.
        decay: constant | linear | cosine; a decay starts where the warm-up ends.
        end_factor: share of the weight left at the end of a decay, in [0, 1].
        stop_iter: first iteration without the term; 0 for never.
    """

    weight: float
    max_iter: int
    warmup_iters: int = 0
    decay: str = "constant"
    end_factor: float = 0.0
    stop_iter: int = 0

    @classmethod
    def from_config(cls, node: CfgNode, max_iter: int, key: str) -> "WeightSchedule":
        """Read ``node.WEIGHT`` and ``node.SCHEDULE``; ``key`` names the node in errors.

        Raises:
            ValueError: a value outside its range; the sentence names the key.
        """
        s = node.SCHEDULE
        if s.DECAY not in DECAYS:
            raise ValueError(
                f"HKD.{key}.SCHEDULE.DECAY is '{s.DECAY}'; choose from {', '.join(DECAYS)}."
            )
        for name, value in [
            ("WEIGHT", node.WEIGHT),
            ("SCHEDULE.WARMUP_ITERS", s.WARMUP_ITERS),
            ("SCHEDULE.STOP_ITER", s.STOP_ITER),
        ]:
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"HKD.{key}.{name} is {value}; give a finite number >= 0.")
        if not 0 <= s.END_FACTOR <= 1:
            raise ValueError(
                f"HKD.{key}.SCHEDULE.END_FACTOR is {s.END_FACTOR}; give a share from 0 to 1."
            )
        return cls(float(node.WEIGHT), max_iter, s.WARMUP_ITERS, s.DECAY, s.END_FACTOR, s.STOP_ITER)

    def stopped(self, iteration: int) -> bool:
        """True from the iteration on from which the term is off for good."""
        return 0 < self.stop_iter <= iteration

    def __call__(self, iteration: int) -> float:
        """Weight at ``iteration``, counted from 0."""
        if self.stopped(iteration):
            return 0.0
        if iteration < self.warmup_iters:
            return self.weight * (iteration + 1) / self.warmup_iters
        if self.decay == "constant":
            return self.weight
        span = max(self.max_iter - self.warmup_iters, 1)
        progress = min((iteration - self.warmup_iters) / span, 1.0)
        if self.decay == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.weight * (1 - progress * (1 - self.end_factor))


def add_schedule(node: CfgNode) -> None:
    """Add the ``SCHEDULE`` of a term's weight, with its defaults, to the term's node in place."""
    # Weight over time; iterations of this run.
    node.SCHEDULE = CfgNode()
    # Iterations over which the weight rises linearly from 0.
    node.SCHEDULE.WARMUP_ITERS = 0
    # Shape after the warm-up: constant | linear | cosine (both fall to END_FACTOR at MAX_ITER).
    node.SCHEDULE.DECAY = "constant"
    # Share of the weight that is left at the end of a decay.
    node.SCHEDULE.END_FACTOR = 0.0
    # Iteration from which the term is off; 0 for never.
    node.SCHEDULE.STOP_ITER = 0
