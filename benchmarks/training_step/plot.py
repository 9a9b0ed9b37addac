"""The stages of training steps as stacked bars."""

import os
from collections.abc import Mapping

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from hkd_d2.visualization.curves import COLOURS, DPI

THIN = 0.012  # of the highest bar; thinner stages cannot be seen


def plot_ledger(
    bars: Mapping[str, Mapping[str, float]], path: str | os.PathLike, title: str = ""
) -> None:
    """Draw one bar a step, its stages stacked in their order, with the step's time on top.

    A stage has one colour and hatch in all bars; those that are too thin for it have no label.
    Stages that are too thin to be seen in any bar are drawn together as one.

    Args:
        bars: seconds by stage, by the name of the step.
        path: PNG, PDF or SVG to write.
        title: of the picture.

    Raises:
        ValueError: nothing to draw.
    """
    if not bars:
        raise ValueError("There is nothing to draw; give at least one step.")
    highest = max(sum(parts.values()) for parts in bars.values()) * 1e3
    bars = _together(bars, THIN * highest / 1e3)
    # A step of more stages has them in their order; a plain step's are among them.
    most_first = sorted(bars.values(), key=len, reverse=True)
    stages = list(dict.fromkeys(stage for parts in most_first for stage in parts))
    figure = Figure(figsize=(2.4 + 1.6 * len(bars), 4.8), layout="constrained")
    axes = figure.add_subplot()
    tops = dict.fromkeys(bars, 0.0)
    for number, stage in enumerate(stages):
        heights = [parts.get(stage, 0.0) * 1e3 for parts in bars.values()]
        colour = COLOURS[number % len(COLOURS)]
        drawn = axes.bar(
            list(bars),
            heights,
            bottom=list(tops.values()),
            width=0.6,
            label=stage,
            color=colour,
            hatch="//" if number >= len(COLOURS) else None,
            edgecolor="white",
        )
        labels = [f"{h:.0f}" if h > 0.035 * highest else "" for h in heights]
        ink = "black" if sum(to_rgb(colour)) > 1.5 else "white"
        axes.bar_label(drawn, labels, label_type="center", color=ink, fontsize=9)
        tops = {name: top + h for (name, top), h in zip(tops.items(), heights, strict=True)}
    for number, top in enumerate(tops.values()):
        axes.annotate(f"{top:.0f} ms", (number, top), ha="center", va="bottom", weight="bold")
    axes.set(ylabel="ms a step", title=title, ylim=(0, 1.08 * max(tops.values())))
    axes.grid(axis="y", color="0.88")
    axes.set_axisbelow(True)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right upper")
    figure.savefig(path, dpi=DPI)


def _together(bars: Mapping[str, Mapping[str, float]], least: float) -> dict[str, dict[str, float]]:
    """The bars, all stages under ``least`` seconds everywhere as one on top."""
    longest = {}
    for parts in bars.values():
        for stage, seconds in parts.items():
            longest[stage] = max(seconds, longest.get(stage, 0.0))
    thin = {stage for stage, seconds in longest.items() if seconds < least}
    if len(thin) < 2:
        return {name: dict(parts) for name, parts in bars.items()}
    rest = f"{len(thin)} stages under {least * 1e3:.2g} ms"
    return {
        name: {stage: seconds for stage, seconds in parts.items() if stage not in thin}
        | {rest: sum(seconds for stage, seconds in parts.items() if stage in thin)}
        for name, parts in bars.items()
    }
