"""Pictures for people: samples of data, curves, detections and errors.

Everything is drawn with matplotlib's Agg canvas, without a display and without pyplot's global
state, in colours that the colour-blind can tell apart.
"""

from hkd_d2.visualization.annotations import draw_annotations, plot_samples, sample_records
from hkd_d2.visualization.curves import COLOURS, plot_miss_rate, plot_training
from hkd_d2.visualization.detections import (
    Matches,
    Scene,
    compare_detections,
    draw_detections,
    make_scenes,
    match_detections,
)
from hkd_d2.visualization.error_page import ImageFolder, write_error_page
from hkd_d2.visualization.errors import crop_tile, plot_calibration, plot_miss_ranges

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
    "plot_miss_ranges",
    "plot_miss_rate",
    "plot_samples",
    "plot_training",
    "sample_records",
    "write_error_page",
]
