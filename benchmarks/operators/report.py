"""The record of the operator benchmark: an append-only CSV, its table and its picture."""

import csv
from pathlib import Path

from benchmarks.operators.cases import CASES

COLUMNS = (
    *("date", "device", "instruction_set", "threads", "torch", "commit", "malloc", "scale"),
    *("case", "dtype", "layout", "provider", "mode", "rounds", "median_ms", "p20_ms", "p80_ms"),
    *("gb_per_s", "percent_of_floor", "ratio_to_eager", "ratio_to_usual", "extra_mb"),
    *("read_gb_per_s", "write_gb_per_s"),
)
# Bars of the picture, from top to bottom; of Okabe and Ito's palette.
COLOURS = {"fused": "#0072B2", "compile": "#BBBBBB", "eager": "#E69F00"}
HEADINGS = (
    *("case", "layout", "eager, ms", "usual, ms", "compile, ms", "fused, ms"),
    *("x eager", "x usual", "target", "default malloc", "% of floor", "extra MB"),
)


# ------------------------------------------------------------------------------------------- CSV
def check(path: Path) -> None:
    """Refuse what cannot be appended to.

    Raises:
        ValueError: the folder is missing, or the file has other columns.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder; make it, or name another file with --csv.")
    if path.exists() and path.stat().st_size:
        with open(path, newline="", encoding="utf-8") as file:
            if tuple(next(csv.reader(file))) != COLUMNS:
                raise ValueError(
                    f"{path} has other columns than this benchmark writes; name another file with "
                    "--csv."
                )


def append(path: Path, rows: list[dict]) -> None:
    """Add rows at the end; what is there stays as it is."""
    check(path)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def read(path: Path, date: str) -> list[dict]:
    """Rows of the run of this date, numbers as float, empty fields as None."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["date"] == date]
    for row in rows:
        for column in COLUMNS[COLUMNS.index("rounds") :]:
            row[column] = float(row[column]) if row[column] else None
    return rows


# ------------------------------------------------------------------------------------------ table
class Run:
    """Rows of one run, ready to be asked for one."""

    def __init__(self, rows: list[dict]):
        # A CPU has an instruction set.
        self.gpu, self.dtype = not rows[0]["instruction_set"], rows[0]["dtype"]
        # On a GPU, or where it was asked for, default malloc is all there is.
        settings = {row["malloc"] for row in rows}
        self.malloc = "tuned" if "tuned" in settings else "default"
        self.rows = rows
        self._full = {
            (row["malloc"], row["case"], row["layout"], row["provider"]): row
            for row in rows
            if row["mode"] == "full"
        }

    def pairs(self) -> list[tuple[str, str]]:
        """(case, layout) in the order of the cases."""
        found = {(case, layout) for _, case, layout, _ in self._full}
        return [(c, layout) for c in CASES for layout in CASES[c].layouts if (c, layout) in found]

    def row(self, case, layout, provider, malloc=None) -> dict | None:
        """Row of forward and backward together."""
        return self._full.get((malloc or self.malloc, case, layout, provider))

    def fastest(self, case, provider) -> float | None:
        """Milliseconds of a provider in its faster layout."""
        rows = [self.row(case, layout, provider) for layout in CASES[case].layouts]
        return min((row["median_ms"] for row in rows if row), default=None)

    def ratio(self, case, layout, provider="fused", malloc=None) -> float | None:
        """To the baseline that the case's targets divide by; eager where that was not run."""
        row = self.row(case, layout, provider, malloc)
        if row is None:
            return None
        return row[f"ratio_to_{CASES[case].baseline}"] or row["ratio_to_eager"]


def _number(value, form="{:.3g}", missing=""):
    return missing if value is None else form.format(value)


def _milliseconds(value):
    return _number(value, "{:.3g}" if value is not None and value < 100 else "{:.0f}")


def _target(case, run, layout, row):
    ratio, floor = case.target(layout, run.dtype, run.gpu)
    targets = []
    for least, column, unit in (
        (ratio, f"ratio_to_{case.baseline}", f"x {case.baseline}"),
        (floor, "percent_of_floor", " %"),
    ):
        if least:
            seen = row and row[column]
            verdict = "" if seen is None else " met" if seen >= least else " missed"
            targets.append(f"{least:g}{unit}{verdict}")
    return ", ".join(targets)


def table(rows: list[dict]) -> str:
    """Markdown table of a run: forward and backward together, medians.

    ``eager`` and ``usual`` are given in their faster layout, whatever the row's.
    """
    run = Run(rows)
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---" + "|---:" * (len(HEADINGS) - 2) + "|"]
    for name, layout in run.pairs():
        case, row = CASES[name], run.row(name, layout, "fused")
        compiled = run.row(name, layout, "compile")
        cells = [
            name,
            layout,
            _milliseconds(run.fastest(name, "eager")),
            _milliseconds(run.fastest(name, "usual")),
            _milliseconds(compiled and compiled["median_ms"]),
            _milliseconds(row["median_ms"]) if row else "not compiled",
            _number(row and row["ratio_to_eager"]),
            _number(row and row["ratio_to_usual"]),
            _target(case, run, layout, row),
            _number(run.ratio(name, layout, malloc="default")),
            _number(row and row["percent_of_floor"], "{:.0f}"),
            _number(row and row["extra_mb"], "{:.1f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- picture
def plot(rows: list[dict], path: Path) -> None:
    """Bars of the ratios of a run, beside their targets.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    run = Run(rows)
    pairs = run.pairs()[::-1]
    figure = Figure(figsize=(8, 1.6 + 0.36 * len(pairs)), layout="constrained")
    axes = figure.add_subplot()
    for number, (provider, colour) in enumerate(COLOURS.items()):
        bars = [
            (place + 0.27 * (1 - number), run.ratio(case, layout, provider))
            for place, (case, layout) in enumerate(pairs)
            if provider != CASES[case].baseline
        ]
        bars = [(place, ratio) for place, ratio in bars if ratio is not None]
        if not bars:
            continue
        places, ratios = zip(*bars, strict=True)
        # From 1 to the ratio, so that what is slower than the baseline points to the left.
        drawn = axes.barh(
            places, [r - 1 for r in ratios], 0.25, left=1, color=colour, label=provider
        )
        if provider == "fused":
            axes.bar_label(drawn, [f"{r:.3g}x" for r in ratios], padding=3, fontsize=8)
    targets = [
        (ratio, place + 0.27)
        for place, (case, layout) in enumerate(pairs)
        if (ratio := CASES[case].target(layout, run.dtype, run.gpu)[0])
    ]
    if targets:
        mark = dict(marker="|", markersize=14, markeredgewidth=2, color="#D55E00", linestyle="")
        axes.plot(*zip(*targets, strict=True), label="target", **mark)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(pairs)), [f"{case}, {layout}" for case, layout in pairs], fontsize=8)
    first = rows[0]
    axes.set_title(
        f"{first['device']}, {first['threads']} threads, {first['scale']} scale, "
        f"{first['dtype']}, PyTorch "
        f"{first['torch']}, {first['commit']}",
        fontsize=9,
    )
    axes.set_xscale("log")
    axes.set_xlabel(
        "forward + backward: times as fast as the faster layout of\n"
        "what is usually written (roi_*, masked), of plain PyTorch (the others)",
        fontsize=8,
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x", color="0.88")
    axes.set_axisbelow(True)
    axes.margins(x=0.12, y=0.02)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=100)
