"""Accuracy over latency of detectors that were benchmarked."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from hkd_d2.visualization.curves import COLOURS


def plot_accuracy_latency(rows: Sequence[dict], path: Path, setup: str, title: str) -> None:
    """MR^-2 over the median latency of the smallest batch, with a line to the 90th percentile.

    Detectors without a miss rate in this setup are left out; towards the lower left is better.

    Args:
        rows: as :func:`hkd_d2.inference.benchmark.format_table` takes them.
        path: PNG, PDF or SVG.
        setup: of the miss rate.
        title: of the picture.
    """
    rows = [row for row in rows if row["miss_rate"].get(setup) is not None]
    batch = next(iter(rows[0]["latency"])) if rows else "1"
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        times, rate = row["latency"][batch], row["miss_rate"][setup]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot([times["p50_ms"], times["p90_ms"]], [rate, rate], color=colour, linewidth=1.5)
        axes.plot(times["p50_ms"], rate, marker="os^Dv"[number % 5], markersize=9, color=colour)
        axes.annotate(
            row["model"], (times["p50_ms"], rate), (8, 7), textcoords="offset points", fontsize=9
        )
    axes.set(
        xlabel=f"milliseconds at batch {batch}, median and 90th percentile",
        ylabel=f"MR$^{{-2}}$ {setup}, percent (lower is better)",
    )
    axes.set_xlim(left=0)
    axes.margins(x=0.2, y=0.15)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
