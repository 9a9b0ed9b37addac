"""Pictures for people: curves of miss rate and training, detections, the stages of a step.

Everything is drawn with matplotlib's Agg canvas, without a display and without pyplot's global
state, in colours that the colour-blind can tell apart.
"""

from .curves import COLOURS, plot_miss_rate, plot_training
from .detections import (
    Matches,
    Scene,
    compare_detections,
    draw_detections,
    make_scenes,
    match_detections,
)
from .ledger import plot_ledger
from .methods import plot_methods

__all__ = [
    "COLOURS",
    "Matches",
    "Scene",
    "compare_detections",
    "draw_detections",
    "make_scenes",
    "match_detections",
    "plot_ledger",
    "plot_methods",
    "plot_miss_rate",
    "plot_training",
]
