"""The whole journey on generated streets and a CPU: teacher, plain student, distilled student.

    python tools/quickstart.py --seeds 0          or    make quickstart
    python tools/quickstart.py --seeds 0,1,2      or    make quickstart SEEDS=0,1,2

Draws the data, trains with hkd train, compares, and writes a table and pictures to
output/quickstart. What an earlier call finished is used again, unless its settings changed.
"""

import hkd_d2._quiet  # noqa: F401  isort: skip
import hkd_d2._requirements  # noqa: F401  isort: skip

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from experiments.command import run_experiment
from experiments.runs import (
    CONFIGS,
    ROOT,
    TEACHER_SEED,
    Run,
    draw_streets,
    format_time,
    measured_speed,
    parse_seeds,
    predict,
    read_config,
    street_options,
    train,
)
from experiments.scores import MISS_RATES, SCORES, mean_and_error
from hkd_d2.config import student_config
from hkd_d2.data.datasets import check_records, register_datasets
from hkd_d2.data.mapper import PedestrianMapper
from hkd_d2.evaluation import (
    CITYPERSONS,
    MISSING_POINTS,
    SETUPS,
    coco_ground_truth,
    evaluate_miss_rate,
)
from hkd_d2.files import write_text
from hkd_d2.modeling.checkpoint import StudentCheckpointer
from hkd_d2.modeling.summary import count_flops, count_parameters, image_size
from hkd_d2.visualization import (
    compare_detections,
    make_scenes,
    plot_miss_rate,
    plot_training,
)

TEACHER, PLAIN, DISTILLED = "teacher", "plain student", "distilled student"

MIN_SCORE = 0.5  # of the detections in the picture
TIMED_IMAGES = 30
WARM_UP_IMAGES = 3
# Seconds of an iteration on two cores: a first guess, to be scaled by what this machine shows.
SECONDS_PER_ITERATION = {TEACHER: 0.145, PLAIN: 0.061, DISTILLED: 0.106}


# ---------------------------------------------------------------------------------------- training


def plan_runs(output: Path, seeds: list[int], smoke: bool) -> list[Run]:
    """The teacher, then for each seed a plain and a distilled student."""
    changes = street_options(output / "streets")
    if smoke:
        changes += ["SOLVER.MAX_ITER", 2]

    def run(kind, seed, config, folder, more=()):
        file = CONFIGS / "quickstart" / config
        speed = SECONDS_PER_ITERATION[kind]
        return Run(kind, seed, file, output / folder, [*changes, *more], speed)

    teacher = run(TEACHER, TEACHER_SEED, "teacher.yaml", "teacher")
    distilling = ["HKD.TEACHER.WEIGHTS", str(teacher.weights)]
    runs = [teacher]
    for seed in seeds:
        runs.append(run(PLAIN, seed, "student.yaml", f"student_seed{seed}"))
        runs.append(run(DISTILLED, seed, "hkd.yaml", f"hkd_seed{seed}", distilling))
    return runs


# --------------------------------------------------------------------------------------- comparison


def build(config_file: Path, options: list) -> tuple[torch.nn.Module, CfgNode]:
    """The bare detector of a config file, without weights; of a distillation, the student."""
    cfg = read_config(config_file, [*options, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    cfg = student_config(cfg)
    cfg.HKD.BACKBONE.PRETRAINED = False
    return build_model(cfg).eval(), cfg


def weigh(model: torch.nn.Module, cfg: CfgNode) -> dict[str, float]:
    """Parameters in millions and multiply-adds in 1e9 at the test size."""
    return {
        "parameters": count_parameters(model)["total"] / 1e6,
        "gflops": count_flops(model, image_size(cfg))["total"],
    }


def time_models(models: list[torch.nn.Module], cfg: CfgNode, records: list[dict]) -> list[float]:
    """Median milliseconds an image of each model, one image at a time, the models taking turns."""
    mapper = PedestrianMapper(cfg, False)
    inputs = [mapper(record) for record in records[:TIMED_IMAGES]]
    times = [[] for _ in models]
    with torch.no_grad():
        for turn, record in enumerate([*inputs[:WARM_UP_IMAGES], *inputs]):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model([record])
                if turn >= WARM_UP_IMAGES:
                    taken.append(1e3 * (time.perf_counter() - start))
    return [float(np.median(taken)) for taken in times]


def summarise(rows: list[dict]) -> list[dict]:
    """Mean and standard error over seeds, paired differences, and the share of the gap closed.

    Args:
        rows: of the teacher, then of plain and distilled students seed by seed.

    Returns:
        rows of the table that follow from these.
    """
    teacher = rows[0]
    plain, distilled = ([r for r in rows if r["model"] == kind] for kind in (PLAIN, DISTILLED))
    several = len(plain) > 1
    summary = []
    if several:
        for kind, group in ((PLAIN, plain), (DISTILLED, distilled)):
            summary.append({"model": kind, "seed": "mean", **over_seeds(group)})
    difference = {"model": "plain - distilled", "seed": "paired" if several else plain[0]["seed"]}
    closed = {"model": "gap to the teacher closed", "seed": "mean" if several else plain[0]["seed"]}
    for key in SCORES:
        pairs = [(a[key], b[key]) for a, b in zip(plain, distilled, strict=True)]
        if any(value is None for pair in [*pairs, (teacher[key],)] for value in pair):
            difference[key] = closed[key] = None
            continue
        gains = [a - b for a, b in pairs]
        difference[key], difference[f"{key}_se"] = mean_and_error(gains)
        gap = np.mean([a for a, _ in pairs]) - teacher[key]
        # Only where the teacher is the better one; a rate that falls and an AP that rises.
        better = gap < 0 if key == "AP" else gap > 0
        closed[key] = 100 * difference[key] / gap if better else None
    return [*summary, difference, closed]


def over_seeds(rows: list[dict]) -> dict:
    summary = {}
    for key in ("parameters", "gflops", "ms", *SCORES):
        values = [row[key] for row in rows]
        if None in values:
            summary[key] = None
        else:
            summary[key], error = mean_and_error(values)
            if key in SCORES:
                summary[f"{key}_se"] = error
    return summary


def judge(difference: dict, number: int) -> str:
    """The sentence on the claim that distillation helps, by the standard error of the pairs."""
    gain, error = difference["Reasonable"], difference.get("Reasonable_se")
    claim = "The distilled student beats the plain one (MR^-2 Reasonable)"
    if gain is None:
        return f"{claim}: not shown, nothing to find in the images."
    if error is None or number < 3:
        few = "one seed says" if number == 1 else f"{number} seeds say"
        return (
            f"{claim}: plain - distilled = {gain:+.2f} points, but {few} little; "
            "run make quickstart SEEDS=0,1,2."
        )
    verdict = "shown" if gain > error else "not shown"
    return (
        f"{claim}: {verdict}. Mean of plain - distilled over {number} seeds {gain:+.2f} points, "
        f"standard error of the paired difference {error:.2f}."
    )


def format_table(rows: list[dict]) -> str:
    """The rows as a Markdown table that is legible as plain text."""
    head = ["model", "seed", "parameters", "GFLOPs", "ms/image"]
    head += [f"MR^-2 {name}" for name in MISS_RATES] + ["AP"]
    cells = [head]
    for row in rows:
        ratio = row["model"].startswith("ratio")
        weights = ["{:.1f} x"] * 3 if ratio else ["{:.2f} M", "{:.2f}", "{:.1f}"]
        line = [row["model"], str(row.get("seed", "-"))]
        for key, form in zip(("parameters", "gflops", "ms"), weights, strict=True):
            line.append("-" if row.get(key) is None else form.format(row[key]))
        percent = row["model"].startswith("gap")
        for key in SCORES:
            value, error = row.get(key), row.get(f"{key}_se")
            if value is None:
                line.append("-")
            elif percent:
                line.append(f"{value:.0f} %")
            else:
                line.append(f"{value:.2f}" + (f" ± {error:.2f}" if error is not None else ""))
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [line[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        for line in cells
    ]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def choose_scenes(scenes: list) -> dict:
    """Images for the picture, by label: where the students differ most, and two for comparison.

    Up to two in which the distilled student finds most that the plain one misses, one the other way
    round, and those a third and two thirds into the images with anybody to find. Ties go to the
    earlier image.
    """
    gains = [int(s.matches(DISTILLED).found.sum() - s.matches(PLAIN).found.sum()) for s in scenes]
    order = sorted(range(len(scenes)), key=lambda i: -gains[i])
    chosen = {}
    for index in order[:2]:
        if gains[index] > 0:
            chosen[index] = f"distilled finds {gains[index]} more"
    if gains[order[-1]] < 0:
        worst = gains.index(gains[order[-1]])
        chosen[worst] = f"plain finds {-gains[worst]} more"
    populated = [i for i, scene in enumerate(scenes) if len(scene.truth)] or [0]
    for third in (1, 2):
        chosen.setdefault(populated[third * len(populated) // 3], "by its place")
    return {f"image {index + 1}\n{label}": scenes[index] for index, label in chosen.items()}


def score(run: Run, ground_truth: dict, missing_point: str) -> tuple[dict, dict]:
    """The scores of a run's own evaluation, for the table, and its result for every setup."""
    results = evaluate_miss_rate(ground_truth, run.detections(), SETUPS, missing_point)
    row = {"model": run.kind, "seed": run.seed}
    for name, setup in MISS_RATES.items():
        found = results[setup]
        row[name] = found.miss_rate if found.num_ground_truth else None
    precision = run.results()["bbox/AP"]
    row["AP"] = None if math.isnan(precision) else precision
    return row, results


def compare(runs: list[Run], output: Path, smoke: bool) -> str:
    """Score, time and count all detectors, write results and pictures, and return the report."""
    cfg, seeds = runs[0].config, [run.seed for run in runs if run.kind == PLAIN]
    register_datasets(cfg)
    records = check_records(cfg.DATASETS.TEST[0])
    ground_truth = coco_ground_truth(records)
    missing_point = cfg.HKD.EVALUATION.MISSING_POINT or CITYPERSONS.missing_point

    models, rows, curves = [], [], {}
    for run in runs:
        row, results = score(run, ground_truth, missing_point)
        curves.setdefault(run.kind, []).append(results["Reasonable"])
        model, run_cfg = build(run.config_file, run.options)
        StudentCheckpointer(model).load_complete(str(run.weights), str(run.config_file))
        models.append(model)
        rows.append({**row, **weigh(model, run_cfg)})
    for row, taken in zip(rows, time_models(models, cfg, records), strict=True):
        row["ms"] = taken
    headline = [
        {"model": f"headline {kind}", **weigh(*build(CONFIGS / f"{kind}_citypersons.yaml", []))}
        for kind in ("teacher", "student")
    ]
    summary = summarise(rows)
    table = [
        *rows,
        *summary,
        ratio("ratio teacher : student", rows[0], rows[1]),
        *headline,
        ratio("ratio headline pair", *headline),
    ]
    claim = judge(next(r for r in summary if r["model"] == "plain - distilled"), len(seeds))
    facts = {
        "num_train_images": len(check_records(cfg.DATASETS.TRAIN[0])),
        "num_images": len(records),
        "image_size": image_size(cfg),
        "headline_image_size": image_size(read_config(CONFIGS / "teacher_citypersons.yaml", [])),
        "missing_point": missing_point,
        "missing_point_rule": MISSING_POINTS[missing_point],
        "setups": MISS_RATES,
        "device": cfg.MODEL.DEVICE,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "training_seconds": {run.folder.name: run.seconds() for run in runs},
    }

    plot_miss_rate(curves, output / "miss_rate_curves.png", "Reasonable")
    metrics = {
        kind: [run.folder / "metrics.json" for run in runs if run.kind == kind] for kind in curves
    }
    plot_training(metrics, output / "training_curves.png")
    shown = {run.kind: run.detections() for run in runs[:3]}
    compare_detections(
        choose_scenes(make_scenes(records, shown, SETUPS["Reasonable"], MIN_SCORE)),
        output / "detections.png",
        f"Detections of score >= {MIN_SCORE} (seed {seeds[0]}); pedestrians of the setup "
        "Reasonable count, others are ignored.\nNot an average: images in which the distilled "
        "student finds most that the plain one misses (up to two), one the other\nway round (if "
        "any), and two by their place in the set alone.",
    )
    content = {"claim": claim, "seeds": seeds, "smoke": smoke, **facts, "rows": table}
    write_text(output / "results.json", json.dumps(content, indent=1, allow_nan=False))
    body = [format_table(table), claim, "\n".join(f"- {n}" for n in notes(facts, seeds, smoke))]
    pictures = [
        "![Miss rate over false positives per image](miss_rate_curves.png)",
        "![Training losses](training_curves.png)",
        "![Detections side by side](detections.png)",
    ]
    title = "# Quickstart: teacher, plain student, distilled student"
    text = "\n\n".join([title, *body, *pictures]) + "\n"
    write_text(output / "results.md", text)
    return "\n\n".join(body)


def notes(facts: dict, seeds: list[int], smoke: bool) -> list[str]:
    """Notes on the numbers."""
    size, headline_size = (
        f"{facts[key][1]} x {facts[key][0]}" for key in ("image_size", "headline_image_size")
    )
    low, high = (round(100 * share) for share in SETUPS[MISS_RATES["Heavy"]].visibility)
    lines = ["A SMOKE TEST of two iterations: the scores mean nothing."] if smoke else []
    lines += [
        f"{facts['num_train_images']} training and {facts['num_images']} evaluation images of "
        f"generated streets, {size} pixels; trained and evaluated on {facts['device']} "
        f"(threads: {facts['threads']}, PyTorch {facts['torch']}).",
        "MR^-2 (log-average miss rate) and COCO AP in percent. Reasonable: at least 50 pixels high "
        f"and 65 % visible. Heavy: {MISS_RATES['Heavy']}, at least 50 pixels, {low} to {high} % "
        "visible. All: at least 20 pixels, 20 % visible.",
        f"Reference points below the start of a curve: rule '{facts['missing_point']}', "
        f"{facts['missing_point_rule']}; from 100 images on there are none.",
        f"GFLOPs: 1e9 multiply-adds an image of {size}, for the headline pair {headline_size}. The "
        "headline pair is built and counted, not trained.",
        f"ms/image: median over {min(TIMED_IMAGES, facts['num_images'])} images, one at a time, "
        "the detectors taking turns, from the image in memory to its boxes.",
        "Plain and distilled of a seed share initialisation, data order, iterations and "
        "evaluation. Where distillation helps, plain - distilled is positive in MR^-2 and negative "
        "in AP.",
    ]
    if len(seeds) > 1:
        lines.append("± is the standard error over seeds; of the difference, that of the pairs.")
    return lines


def ratio(name: str, large: dict, small: dict) -> dict:
    keys = [k for k in ("parameters", "gflops", "ms") if large.get(k) and small.get(k)]
    return {"model": name, **{k: large[k] / small[k] for k in keys}}


# ------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=parse_seeds, default=[0], help="seeds of the students, as 0,1,2"
    )
    parser.add_argument("--output", type=Path, help="folder to write [output/quickstart]")
    parser.add_argument(
        "--smoke", action="store_true", help="try the whole way with a few images and iterations"
    )
    args = parser.parse_args(arguments)
    default = ROOT / "output" / ("quickstart_smoke" if args.smoke else "quickstart")
    output = (args.output or default).resolve()
    runs = plan_runs(output, args.seeds, args.smoke)
    number = len(runs) + 2
    start = time.monotonic()

    print(f"[1/{number}] streets", flush=True)
    draw_streets(output / "streets", args.smoke)
    ahead = predict(runs, measured_speed(runs))
    print(f"  about {format_time(ahead)} of training ahead", flush=True)
    for index, run in enumerate(runs):
        print(f"[{index + 2}/{number}] {run.name}", flush=True)
        train(run, runs[index + 1 :])
        left = predict(runs[index + 1 :], measured_speed(runs[: index + 1]))
        print(
            f"  {format_time(time.monotonic() - start)} since the start, "
            f"about {format_time(left)} of training left",
            flush=True,
        )
    print(f"[{number}/{number}] comparison\n", flush=True)
    print(compare(runs, output, args.smoke))
    print(
        f"\nDone in {format_time(time.monotonic() - start)}. Look at {output}/results.md, "
        "miss_rate_curves.png, training_curves.png and detections.png; next, train on CityPersons "
        "by the recipe in README.md."
    )


def command() -> int:
    """The experiment of the process's command line; returns the exit code."""
    return run_experiment(main, "quickstart.py")


if __name__ == "__main__":
    sys.exit(command())
