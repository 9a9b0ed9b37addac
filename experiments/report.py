"""The comparison of methods as a table, for people, and as CSV."""

import csv
import os

import numpy as np

from experiments.scores import SCORES, mean_and_error
from hkd_d2.files import written_beside

HEAD = (
    "method",
    "seeds",
    "MR^-2 Reasonable",
    "plain - method",
    "Heavy",
    "All",
    "AP",
    "raw loss",
    "share of the gradient",
    "step",
    "memory",
)


def summarise(rows: list[dict]) -> list[dict]:
    """One entry a method: means over its seeds, and its difference to the section's plain student.

    Args:
        rows: of :func:`~experiments.methods.read_row`, in any order of seeds.

    Returns:
        entries in the order of the rows, a section's plain student first, with ``scores`` (column:
        list over seeds), ``gain`` (mean of plain - method in MR^-2 Reasonable over the seeds of
        both, its standard error; None without such seeds and for the plain student), and ``raw``
        and ``share`` (term: first and last, means over seeds).
    """
    order = list(dict.fromkeys(row["section"] for row in rows))
    groups = {}
    for row in rows:
        groups.setdefault((row["section"], row["method"]), []).append(row)
    entries = []
    for (section, method), group in groups.items():
        group = sorted(group, key=lambda row: row["seed"])
        plain = {
            row["seed"]: row["Reasonable"]
            for row in rows
            if row["plain"] and row["section"] == section
        }
        gains = [
            plain[r["seed"]] - r["Reasonable"]
            for r in group
            if r["seed"] in plain and not r["plain"]
        ]
        entry = {
            "section": section,
            "method": method,
            "plain": group[0]["plain"],
            "seeds": [row["seed"] for row in group],
            "scores": {key: [row[key] for row in group] for key in SCORES},
            "gain": mean_and_error(gains) if gains else None,
        }
        for column in ("raw", "share"):
            entry[column] = {
                term: [float(x) for x in np.mean([row[column][term] for row in group], axis=0)]
                for term in group[0][column]
                if all(row[column][term] for row in group)
            }
        entries.append(entry)
    return sorted(entries, key=lambda entry: (order.index(entry["section"]), not entry["plain"]))


def format_tables(entries: list[dict], teachers: dict[str, dict], costs: dict[str, dict]) -> str:
    """A Markdown table a section.

    Args:
        entries: of :func:`summarise`.
        teachers: scores of the teacher by section.
        costs: of :func:`~experiments.cost.measure_cost`, by method.
    """
    parts = []
    for section in dict.fromkeys(entry["section"] for entry in entries):
        lines = [f"| {' | '.join(HEAD)} |", f"|---|---|{'---:|' * (len(HEAD) - 2)}"]
        cells = [["teacher", "", *(f"{teachers[section][key]:.2f}" for key in SCORES)]]
        cells[0].insert(3, "")
        for entry in entries:
            if entry["section"] == section:
                cells.append(format_entry(entry, costs.get(entry["method"])))
        for line in cells:
            line += [""] * (len(HEAD) - len(line))
            lines.append(f"| {' | '.join(line)} |")
        parts.append(f"## {section[0].upper()}{section[1:]}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def format_entry(entry: dict, cost: dict | None) -> list[str]:
    miss = entry["scores"]["Reasonable"]
    spread = f" ({min(miss):.1f} to {max(miss):.1f})" if len(miss) > 1 else ""
    gain = ""
    if entry["gain"]:
        mean, error = entry["gain"]
        gain = f"{mean:+.2f}" + (f" ± {error:.2f}" if error is not None else "")
    line = [entry["method"], ", ".join(map(str, entry["seeds"])), f"{np.mean(miss):.2f}{spread}"]
    line += [gain, *(f"{np.mean(entry['scores'][key]):.2f}" for key in SCORES[1:])]
    line.append("<br>".join(f"{t} {a:.3g} → {b:.3g}" for t, (a, b) in entry["raw"].items()))
    line.append(
        "<br>".join(f"{t} {percent(a)} → {percent(b)}" for t, (a, b) in entry["share"].items())
    )
    if cost:
        line += [f"{cost['step']:.2f} x", f"{cost['memory']:.2f} x"]
    return line


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def write_csv(rows: list[dict], costs: dict[str, dict], path: str | os.PathLike) -> None:
    """Write one line a run: scores, first and last raw loss and share of each term, cost."""
    fields = ["section", "method", "seed", *SCORES]
    fields += ["raw_first", "raw_last", "share_first", "share_last"]
    fields += ["seconds", "step_ratio", "memory_ratio"]
    with written_beside(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            line = {**row, "seconds": round(row["seconds"], 1)}
            line.update({key: round(row[key], 3) for key in SCORES})
            for column in ("raw", "share"):
                for place, name in enumerate(("first", "last")):
                    values = {t: v[place] for t, v in row[column].items() if v}
                    line[f"{column}_{name}"] = " ".join(f"{t}={v:.4g}" for t, v in values.items())
            cost = costs.get(row["method"])
            if cost:
                line["step_ratio"] = round(cost["step"], 3)
                line["memory_ratio"] = round(cost["memory"], 3)
            writer.writerow(line)
