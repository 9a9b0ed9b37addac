"""The scores that comparisons show, and their means over seeds."""

import math

import numpy as np

# Column of a table: setup of the miss rate. "Heavy" is the benchmark's own, 20 to 65 % visible.
MISS_RATES = {"Reasonable": "Reasonable", "Heavy": "Reasonable_occ=heavy", "All": "All"}
SCORES = (*MISS_RATES, "AP")


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error: the sample standard deviation over the root of the number."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), None if error is None else float(error)
