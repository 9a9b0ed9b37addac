"""Pictures for people: samples of data, curves, detections, errors, stages of a step.

Everything is drawn with matplotlib's Agg canvas, without a display and without pyplot's global
state, in colours that the colour-blind can tell apart.
"""

from .annotations import draw_annotations, plot_samples, sample_records
from .curves import COLOURS, plot_miss_rate, plot_training
from .detections import (
    Matches,
    Scene,
    compare_detections,
    draw_detections,
    make_scenes,
    match_detections,
)
from .error_page import ImageFolder, write_error_page
from .errors import crop_tile, plot_calibration, plot_miss_ranges
from .ledger import plot_ledger
from .methods import plot_methods

__all__ = [
    "COLOURS",
    "ImageFolder",
    "Matches",
    "Scene",
    "compare_detections",
    "crop_tile",
    "draw_annotations",
    "draw_detections",
    "make_scenes",
    "match_detections",
    "plot_calibration",
    "plot_ledger",
    "plot_methods",
    "plot_miss_ranges",
    "plot_miss_rate",
    "plot_samples",
    "plot_training",
    "sample_records",
    "write_error_page",
]
