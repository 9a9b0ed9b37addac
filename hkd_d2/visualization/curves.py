"""Curves over false positives per image, and over training."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hkd_d2.evaluation import REFERENCE_FPPI, MissRateResult

# The palette of Okabe and Ito ("Color Universal Design", 2008), the most distinct first.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-", "-.", ":")

MISS_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.64, 0.8, 1.0)
MAX_FPPI = 10.0
DPI = 130


def plot_miss_rate(
    results: Mapping[str, MissRateResult | Sequence[MissRateResult]],
    path: str | os.PathLike | BinaryIO,
    setup: str,
) -> None:
    """Draw miss rate over false positives per image, log-log, as papers on pedestrians do.

    The nine reference values whose log-average is MR^-2 are marked by ticks on top. Operating
    points without any false positive lie at the left edge.

    Args:
        results: a result of one setup, or one a seed, by the detector's name; the legend gives
            MR^-2, for several seeds their mean.
        path: PNG, PDF or SVG to write, or a binary file for a PNG.
        setup: the setup's name, for the title.

    Raises:
        ValueError: no results, or a detector without any.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    first, lowest = REFERENCE_FPPI[0], 1.0
    for (name, runs), colour, dash in _styled(_as_lists(results)):
        label = f"{_score(runs)}  {name}"
        axes.plot([], [], color=colour, linestyle=dash, linewidth=2, label=label)
        for run in runs:
            if not (run.num_ground_truth and run.num_detections):
                continue
            # Before the first detection everything is missed, at no false positive.
            fppi, miss = np.append(0, run.fppi), np.append(1, run.miss)
            axes.plot(
                np.maximum(fppi, 1e-9),
                np.maximum(miss, 1e-9),
                color=colour,
                linestyle=dash,
                linewidth=2 if len(runs) == 1 else 1.2,
                drawstyle="steps-post",
            )
            first = min([first, *run.fppi[run.fppi > 0]])
            lowest = min([lowest, *run.miss[run.fppi <= MAX_FPPI]])
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(first, MAX_FPPI),
        ylim=(max([t for t in MISS_TICKS if t < lowest], default=MISS_TICKS[0]), 1.0),
        xlabel="false positives per image",
        ylabel="miss rate",
        title=f"{setup}: miss rate over false positives (MR$^{{-2}}$ in the legend)",
    )
    axes.yaxis.set(
        major_locator=FixedLocator(MISS_TICKS),
        minor_locator=NullLocator(),
        major_formatter=FuncFormatter(lambda value, _: f"{value:g}"),
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color="0.88")
    for value in REFERENCE_FPPI:
        axes.axvline(value, ymin=0.985, color="0.3", linewidth=1.2)
    axes.legend(loc="lower left", framealpha=0.95)
    figure.savefig(path, dpi=DPI)


def plot_training(
    runs: Mapping[str, str | os.PathLike | Sequence[str | os.PathLike]], path: str | os.PathLike
) -> None:
    """Draw each run's own detection loss, and where there are any the distillation losses.

    The own loss is the sum of the entries ``loss_*`` without ``loss_hkd_*``, so that plain and
    distilled runs compare, as Detectron2 writes it: the median of the last 20 iterations. The
    distillation losses are unweighted, of single iterations.

    Args:
        runs: ``metrics.json`` of a run, or one a seed, by the detector's name.
        path: PNG, PDF or SVG to write.

    Raises:
        FileNotFoundError: a ``metrics.json`` is missing.
        ValueError: a line of it is no JSON object, or there are no runs.
    """
    curves = {
        name: [_read_metrics(file) for file in files] for name, files in _as_lists(runs).items()
    }
    terms = sorted(
        {
            key.removeprefix("hkd/").removesuffix("_raw")
            for files in curves.values()
            for lines in files
            for line in lines
            for key in line
            if key.startswith("hkd/") and key.endswith("_raw")
        }
    )
    figure = Figure(figsize=(10.5 if terms else 6.4, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if terms else 1, squeeze=False)[0]

    own = panels[0]
    for (name, files), colour, dash in _styled(curves):
        for number, lines in enumerate(files):
            points = [(line["iteration"], _own_loss(line)) for line in lines]
            points = [point for point in points if point[1] is not None]
            _line(own, points, name if number == 0 else None, colour, dash, len(files))
    own.set(title="The detector's own losses, summed", xlabel="iteration", ylabel="loss")
    own.legend()

    if terms:
        # The detectors keep their colours to themselves.
        for term, colour, dash in _styled(dict.fromkeys(terms), first=len(curves)):
            key, label = f"hkd/{term[0]}_raw", term[0]
            for files in curves.values():
                for lines in files:
                    points = [(line["iteration"], line[key]) for line in lines if key in line]
                    if points:
                        _line(panels[1], points, label, colour, dash, len(files))
                        label = None
        panels[1].set(
            title="Distillation losses, unweighted",
            xlabel="iteration",
            ylabel="loss",
            yscale="log",
        )
        panels[1].legend()
    for axes in panels:
        axes.grid(color="0.88")
    figure.savefig(path, dpi=DPI)


def _line(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    label: str | None,
    colour: str,
    dash: str,
    siblings: int,
) -> None:
    x, y = zip(*points, strict=True) if points else ((), ())
    marker = "o" if len(x) == 1 else None  # a single point is no line
    width = 1.8 if siblings == 1 else 1.1
    axes.plot(x, y, label=label, color=colour, linestyle=dash, linewidth=width, marker=marker)


def _styled(named: Mapping, first: int = 0) -> Iterator[tuple[tuple, str, str]]:
    """Each item with its colour and its dashes, which tell lines apart in black and white too.

    Args:
        named: the items.
        first: so many colours are taken, as far as there are others.
    """
    free = COLOURS[first:] or COLOURS
    for index, item in enumerate(named.items()):
        yield item, free[index % len(free)], DASHES[index % len(DASHES)]


def _as_lists(named: Mapping) -> dict[str, list]:
    lists = {
        name: [value] if isinstance(value, MissRateResult | str | os.PathLike) else list(value)
        for name, value in named.items()
    }
    if not lists:
        raise ValueError("There is nothing to draw; give at least one detector.")
    for name, values in lists.items():
        if not values:
            raise ValueError(f"There is nothing to draw of '{name}'; give at least one run of it.")
    return lists


def _score(runs: list[MissRateResult]) -> str:
    if not runs[0].num_ground_truth:
        return "nothing to find"
    return f"{np.mean([run.miss_rate for run in runs]):.1f} %"


def _own_loss(line: Mapping) -> float | None:
    losses = [
        value
        for key, value in line.items()
        if key.startswith("loss_") and not key.startswith("loss_hkd_")
    ]
    return sum(losses) if losses else None


def _read_metrics(path: str | os.PathLike) -> list[dict]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the metrics.json of a training run.")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or "iteration" not in line:
            raise ValueError(
                f"{path}, line {number} is no JSON object with an iteration; give a metrics.json "
                "that Detectron2 wrote, or delete this line if the run was cut off there."
            )
        lines.append(line)
    return lines
