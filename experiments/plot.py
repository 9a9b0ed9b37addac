"""Miss rates of many methods beside the plain student and the teacher."""

import os
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from hkd_d2.visualization.curves import COLOURS, DPI


def plot_methods(
    sections: Mapping[str, Mapping[str, list[float]]],
    plain: Mapping[str, str],
    teachers: Mapping[str, float],
    path: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw one panel a section and one row a method: a dot a seed, a bar at their mean.

    The plain student's mean and the teacher are vertical lines; the best method stands on top.

    Args:
        sections: miss rates in percent, one a seed, by method, by section.
        plain: name of the plain student by section, where there is one.
        teachers: the teacher's miss rate by section.
        path: PNG, PDF or SVG to write.
        title: of the picture.

    Raises:
        ValueError: nothing to draw.
    """
    if not sections:
        raise ValueError("There is nothing to draw; give at least one method.")
    heights = [len(methods) + 1.5 for methods in sections.values()]
    figure = Figure(figsize=(7.6, 1.2 + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(
        len(sections), 1, sharex=True, squeeze=False, height_ratios=heights
    ).ravel()
    black, red, blue = COLOURS[:3]
    for axes, (section, methods) in zip(panels, sections.items(), strict=True):
        names = sorted(methods, key=lambda name: -np.mean(methods[name]))
        for place, name in enumerate(names):
            colour = black if name == plain.get(section) else blue
            values = methods[name]
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=5)
            axes.plot(np.mean(values), place, "|", color=colour, markersize=14, markeredgewidth=2)
        if section in plain:
            mean = float(np.mean(methods[plain[section]]))
            axes.axvline(mean, color=black, linestyle=":", linewidth=1.2, label="plain student")
        axes.axvline(teachers[section], color=red, linestyle="--", linewidth=1.2, label="teacher")
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_title(section, fontsize=10, loc="left")
        axes.grid(axis="x", color="0.88")
        axes.set_axisbelow(True)
    panels[0].legend(loc="center", fontsize=8, framealpha=0.95)
    panels[-1].set_xlabel("MR$^{-2}$ Reasonable, percent (left is better)")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=DPI)
