"""Pictures of a detector's errors: miss rate by size and occlusion, calibration, crops."""

import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from hkd_d2.evaluation.analysis import Calibration, MissRange
from hkd_d2.visualization.curves import COLOURS, DASHES, DPI
from hkd_d2.visualization.detections import STYLES

TILE = (240, 320)  # pixels, width and height
CONTEXT = 1.9  # a tile shows so many times the box's height
OUTSIDE = (96, 96, 96)  # beyond the image's border


def plot_miss_ranges(
    ranges: Mapping[str, Sequence[MissRange]],
    path: str | os.PathLike | BinaryIO,
    what: str,
    title: str = "",
) -> None:
    """Draw the miss rate in each range as bars, the detectors side by side.

    Ranges without pedestrians are left out. Missed pedestrians stand above a bar, all of the range
    under it.

    Args:
        ranges: by the detector's name; all of the same edges.
        path: PNG, PDF or SVG to write, or a binary file for a PNG.
        what: the axis' name, as "height in pixels".
        title: of the picture.

    Raises:
        ValueError: no detectors, or no pedestrians.
    """
    columns = [
        parts
        for parts in zip(*ranges.values(), strict=True)
        if any(part.pedestrians for part in parts)
    ]
    if not columns:
        raise ValueError("There is nothing to draw; give at least one detector and pedestrian.")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.84 / len(ranges)
    for number, (name, parts) in enumerate(zip(ranges, zip(*columns, strict=True), strict=True)):
        drawn = axes.bar(
            np.arange(len(parts)) + (number - (len(ranges) - 1) / 2) * width,
            [part.miss_rate or 0 for part in parts],
            width=width,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            hatch=("", "//", "..", "xx")[number % 4],  # colour alone never tells
            edgecolor="white",
        )
        axes.bar_label(drawn, [part.missed for part in parts], fontsize=7)
    labels = [
        f"{range_label(parts[0].low, parts[0].high)}\n({max(part.pedestrians for part in parts)})"
        for parts in columns
    ]
    axes.set_xticks(range(len(columns)), labels)
    axes.set(ylim=(0, 1.06), xlabel=f"{what} (pedestrians)", ylabel="miss rate", title=title)
    axes.grid(axis="y", color="0.88")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=DPI)


def plot_calibration(
    calibrations: Mapping[str, Calibration],
    path: str | os.PathLike | BinaryIO,
    title: str = "",
) -> None:
    """Draw precision over score, and under it how many detections each range of score holds.

    A calibrated detector's points lie on the diagonal. The legend has the expected calibration
    error; scores under the one from which it is taken are shaded.

    Args:
        calibrations: by the detector's name.
        path: PNG, PDF or SVG to write, or a binary file for a PNG.
        title: of the picture.

    Raises:
        ValueError: no detectors.
    """
    if not calibrations:
        raise ValueError("There is nothing to draw; give at least one detector.")
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    precision, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.2])
    precision.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="calibrated")
    start = max(calibration.min_score for calibration in calibrations.values())
    for axes in (precision, counts):
        axes.axvspan(0, start, color="0.93", zorder=0)
    counts.text(
        start / 2,
        0.04,
        "not\nweighed",
        ha="center",
        fontsize=6,
        color="0.35",
        transform=counts.get_xaxis_transform(),
    )
    for number, (name, calibration) in enumerate(calibrations.items()):
        parts = [part for part in calibration.ranges if part.detections]
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number % len(DASHES)],
            "marker": "osD^v"[number % 5],
        }
        precision.plot(
            [part.mean_score for part in parts],
            [part.precision for part in parts],
            label=f"{name}, error {calibration.error:.3f}",
            **style,
        )
        middles = [(part.low + part.high) / 2 for part in parts]
        counts.plot(middles, [part.detections for part in parts], **style)
    precision.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="precision", title=title)
    precision.legend(loc="lower right", framealpha=0.95)
    counts.set(yscale="log", xlabel="score", ylabel="detections")
    for axes in (precision, counts):
        axes.grid(color="0.88")
    figure.savefig(path, dpi=DPI)


def range_label(low: float, high: float) -> str:
    """ "50 to 75", or "from 150" where there is no upper edge."""
    return f"from {low:g}" if np.isinf(high) else f"{low:g} to {high:g}"


def crop_tile(
    image: Image.Image,
    box: Sequence[float],
    what: str,
    pedestrians: Sequence[Sequence[float]] = (),
    ignored: Sequence[Sequence[float]] = (),
    detections: Sequence[Sequence[float]] = (),
) -> Image.Image:
    """Cut a box with its surroundings out of an image, and draw what is there.

    Args:
        image: RGB.
        box: [x, y, w, h] in pixels, drawn thick in the style of ``what``.
        what: a key of :data:`hkd_d2.visualization.detections.STYLES`.
        pedestrians, ignored, detections: other boxes, drawn thin as pedestrian, ignored and found.

    Returns:
        RGB of size :data:`TILE`; grey beyond the image's border.
    """
    x, y, width, height = box
    aspect = TILE[0] / TILE[1]
    shown = CONTEXT * max(height, width / aspect, 8)  # pixels from top to bottom
    scale = TILE[1] / shown
    left, top = x + width / 2 - shown * aspect / 2, y + height / 2 - shown / 2
    tile = image.convert("RGB").transform(
        TILE,
        Image.Transform.AFFINE,
        (1 / scale, 0, left, 0, 1 / scale, top),
        Image.Resampling.BICUBIC,
        fillcolor=OUTSIDE,
    )
    pen = ImageDraw.Draw(tile)
    layers = [("ignored", ignored), ("pedestrian", pedestrians), ("found", detections)]
    thin = [(style, other, 2) for style, others in layers for other in others]
    for style, (x, y, width, height), line in [*thin, (what, box, 4)]:
        corners = np.array([x - left, y - top, x + width - left, y + height - top]) * scale
        # A dark rim keeps a box visible on a bright wall.
        pen.rectangle((*(corners[:2] - 1), *(corners[2:] + 1)), outline="black", width=line + 2)
        pen.rectangle(corners.tolist(), outline=STYLES[style][0], width=line)
    return tile
