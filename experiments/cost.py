"""Cost of a method: its training step beside the plain student's, in one process."""

import io
import statistics
from contextlib import redirect_stdout

import torch

from benchmarks.training_step.ledger import STEP, keep_ledger, street_batch, training_steps
from experiments.methods import Contender
from experiments.runs import read_config

ROUNDS = 10


def measure_cost(contender: Contender, weights: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Time and memory of a distilled step, as a multiple of the plain student's.

    Both step in turn on one batch of drawn streets, from the weights of a trained plain student.

    Args:
        contender: with terms.
        weights: checkpoint of its family's plain student.
        rounds: counted steps of each; two more warm up.

    Returns:
        dict: ``step``, the median over rounds of the ratio of the two steps' times;
        ``plain_ms``, the median plain step; ``memory``, the ratio of the peaks of tensors above
        what is held before a step.
    """
    run = contender.runs[0]
    cfg = read_config(run.config_file, run.options)
    height, width = cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.INPUT.MAX_SIZE_TRAIN
    torch.manual_seed(0)
    with redirect_stdout(io.StringIO()):  # two streets need no line of progress
        batch = street_batch(cfg, height, width, cfg.SOLVER.IMS_PER_BATCH)
    steps = training_steps(cfg, batch, weights, providers=("stock", "fused"))
    plain, distilled = keep_ledger(steps, batch, rounds).values()
    times = list(zip(plain.seconds[STEP], distilled.seconds[STEP], strict=True))
    return {
        "step": statistics.median(d / p for p, d in times),
        "plain_ms": 1e3 * statistics.median(p for p, _ in times),
        "memory": distilled.peak_bytes[STEP] / plain.peak_bytes[STEP],
    }
