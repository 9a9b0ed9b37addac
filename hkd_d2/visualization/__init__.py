"""Pictures for people: miss-rate curves, training curves, detections side by side.

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

__all__ = [
    "COLOURS",
    "Matches",
    "Scene",
    "compare_detections",
    "draw_detections",
    "make_scenes",
    "match_detections",
    "plot_miss_rate",
    "plot_training",
]
