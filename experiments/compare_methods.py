"""Every distillation method on the same small student, streets and schedule, over several seeds.

    python -m experiments.compare_methods             or    make methods
    python -m experiments.compare_methods --methods fgfi,pkd --seeds 0
                                                or    make methods METHODS=fgfi,pkd SEEDS=0
    python -m experiments.compare_methods --cost         step time and memory alone, anew
    python -m experiments.compare_methods --docs         copy the results into docs/ as well

A method is a file of configs/methods: what it changes is laid over the quickstart's small student
of its kind. Teachers and streets are the quickstart's, and are made where they are missing. The
table, the picture and the figures in output/methods grow with every run that finishes; what an
earlier call finished is used again, unless its settings changed.
"""

import hkd_d2._quiet  # noqa: F401  isort: skip
import hkd_d2._requirements  # noqa: F401  isort: skip

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from experiments.command import run_experiment
from experiments.cost import ROUNDS, measure_cost
from experiments.methods import (
    MAX_ITER,
    Contender,
    choose_methods,
    find_methods,
    plan_contenders,
    plan_teacher,
    read_row,
)
from experiments.plot import plot_methods
from experiments.report import format_tables, summarise, write_csv
from experiments.runs import (
    ROOT,
    Run,
    draw_streets,
    format_time,
    measured_speed,
    parse_seeds,
    predict,
    read_json,
    street_options,
    train,
    train_all,
)
from experiments.scores import MISS_RATES
from hkd_d2.files import write_text

DOCS = {
    "results.csv": ROOT / "docs" / "benchmarks" / "methods.csv",
    "results.md": ROOT / "docs" / "benchmarks" / "methods.md",
    "plot.png": ROOT / "docs" / "images" / "methods.png",
}


def plan(args) -> tuple[list[Contender], list[Contender]]:
    """All contenders with their seeds, requested or finished; and the requested ones."""
    methods = choose_methods(args.methods)
    there = [path.name.rsplit("_seed", 1)[-1] for path in (args.output / "runs").glob("*_seed*")]
    seeds = sorted({*args.seeds, *map(int, there)})
    everything = plan_contenders(
        find_methods(), seeds, args.quickstart, args.output, args.iterations
    )
    families = {c.family for c in everything if c.name in methods}
    chosen = [
        c
        for c in everything
        if c.name in methods or (c.name == c.family.student and c.family in families)
    ]
    return everything, chosen


def label_pool(contender: Contender, teacher: Run) -> None:
    """Let the teacher label the streets, for a method that trains on its detections."""
    pool = contender.pool
    if pool.is_file() and pool.stat().st_mtime > teacher.weights.stat().st_mtime:
        return
    print(f"  {teacher.kind} labels the training streets: {pool}", flush=True)
    command = [sys.executable, "-m", "hkd_d2", "label"]
    command += ["--config-file", str(teacher.config_file), "--model", str(teacher.weights)]
    command += ["--data", "streets_train", "--out", str(pool)]
    streets = Path(teacher.config.HKD.DATA.REGISTER[0][2])
    command += map(str, street_options(streets))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the teacher's labels could not be made:\n{done.stderr[-2000:]}")


class Results:
    """The rows of all runs that are there, and the files that show them."""

    def __init__(self, args, everything: list[Contender], teachers: dict[str, Run]):
        self.args, self.everything, self.teachers = args, everything, teachers
        self.owner = {str(run.folder): c for c in everything for run in c.runs}
        self.rows = {}
        for contender in everything:
            for run in contender.runs:
                if run.record.is_file() and run.finished():
                    self.add(run)

    def add(self, run: Run) -> None:
        self.rows[str(run.folder)] = read_row(self.owner[str(run.folder)], run)

    def write(self, run: Run | None = None) -> None:
        """Write all files, with ``run`` as finished now."""
        if run is not None:
            self.add(run)
        rows = [self.rows[folder] for folder in self.owner if folder in self.rows]
        if not rows:
            return
        output, costs = self.args.output, self.costs()
        entries = summarise(rows)
        teachers = {}
        for contender in self.everything:
            if self.teachers[contender.family.name].finished():
                results = self.teachers[contender.family.name].results()
                teachers[contender.section] = {
                    **{name: results[f"miss_rate/{setup}"] for name, setup in MISS_RATES.items()},
                    "AP": results["bbox/AP"],
                }
        content = {
            "iterations": self.args.iterations,
            "device": self.everything[0].runs[0].config.MODEL.DEVICE,
            "torch": torch.__version__,
            "teachers": teachers,
            "configs": {c.name: c.description for c in self.everything},
            "rows": rows,
            "costs": costs,
        }
        write_text(output / "results.json", json.dumps(content, indent=1))
        write_csv(rows, costs, output / "results.csv")
        notes = "\n".join(f"- {note}" for note in self.notes(rows))
        text = [
            "# Methods on generated streets",
            "Written by `make methods`; [Methods](../methods.md) says what each computes.",
            format_tables(entries, teachers, costs),
            notes,
            "![Miss rates of all methods](plot.png)",
        ]
        write_text(output / "results.md", "\n\n".join(text) + "\n")
        sections = {}
        for entry in entries:
            methods = sections.setdefault(entry["section"], {})
            methods[entry["method"]] = entry["scores"]["Reasonable"]
        plot_methods(
            sections,
            {e["section"]: e["method"] for e in entries if e["plain"]},
            {section: scores["Reasonable"] for section, scores in teachers.items()},
            output / "plot.png",
            f"Methods after {self.args.iterations} iterations on generated streets",
        )

    def notes(self, rows: list[dict]) -> list[str]:
        """Notes on the numbers."""
        return [
            f"Every student trains for {self.args.iterations} iterations of 2 images, from random "
            "weights, with one optimizer and schedule; the quickstart's teachers had 2400. A short "
            "budget: it shows what helps early, not what wins in the end. The methods' weights are "
            "those of configs/methods, published for other data, detectors and schedules, and were "
            "not tuned here.",
            f"On {self.everything[0].runs[0].config.MODEL.DEVICE}, PyTorch {torch.__version__}. "
            "MR^-2 and COCO AP in percent on 200 streets; MR^-2 Reasonable: mean over seeds and "
            "their range; Heavy, All and AP: means. plain - method: paired by seed, ± its standard "
            "error; positive where the method helps.",
            "Raw loss and share of the gradient: each term before its weight, and its weighted "
            "part in the sum of the gradient norms of all losses at the student's pyramid, which "
            "is what HKD.GRADIENT_SHARE_PERIOD logs. Means over the first and the last fifth of "
            "the run, one entry in 20 iterations, then over the seeds; entries of 0, where there "
            "was nothing to compare, do not count.",
            f"step, memory: a training step and its peak of tensors, as multiples of the plain "
            f"student's, in turn in one process; medians of {ROUNDS} rounds. The plain student is "
            "stock Detectron2's, the others train in channels_last with the fused pooler (see "
            "HKD.CHANNELS_LAST and HKD.POOLER), so a method without a teacher can be faster.",
        ]

    def costs(self) -> dict[str, dict]:
        """Measured costs of the methods whose configs have not changed since."""
        file = self.args.output / "costs.json"
        known = read_json(file) if file.is_file() else {}
        return {
            c.name: known[c.name]
            for c in self.everything
            if c.name in known and known[c.name]["config"] == c.description
        }

    def measure_costs(self, chosen: list[Contender], again: bool) -> None:
        """Measure what is missing, or everything anew.

        Raises:
            FileNotFoundError: no trained plain student of the family.
        """
        costs = self.costs()
        plain = {c.name: c.runs for c in self.everything if c.plain}
        for contender in chosen:
            if not contender.terms or (contender.name in costs and not again):
                continue
            trained = [r for r in plain[contender.family.student] if r.weights.is_file()]
            if not trained:
                raise FileNotFoundError(
                    f"There is no trained {contender.family.student} in {self.args.output}, whose "
                    "weights the timed steps start from; train it first, by make methods."
                )
            print(f"  {contender.name}: ", end="", flush=True)
            cost = measure_cost(contender, str(trained[0].weights))
            print(f"step {cost['step']:.2f} x, memory {cost['memory']:.2f} x", flush=True)
            costs[contender.name] = {**cost, "config": contender.description}
            write_text(self.args.output / "costs.json", json.dumps(costs, indent=1))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        help="names of configs/methods without .yaml, as fgfi,pkd [all, and HKD]",
    )
    parser.add_argument("--seeds", type=parse_seeds, default=[0, 1, 2], help="[0,1,2]")
    parser.add_argument("--iterations", type=int, help=f"of every student [{MAX_ITER}]")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="runs at a time, which share the cores [%(default)s]",
    )
    parser.add_argument("--output", type=Path, help="folder to write [output/methods]")
    parser.add_argument(
        "--quickstart", type=Path, help="folder of streets and teachers [output/quickstart]"
    )
    parser.add_argument(
        "--cost", action="store_true", help="measure step and memory, train nothing"
    )
    parser.add_argument("--docs", action="store_true", help="copy the results into docs/")
    parser.add_argument(
        "--smoke", action="store_true", help="try the whole way with a few images and iterations"
    )
    args = parser.parse_args(arguments)
    suffix = "_smoke" if args.smoke else ""
    args.output = (args.output or ROOT / "output" / f"methods{suffix}").resolve()
    args.quickstart = (args.quickstart or ROOT / "output" / f"quickstart{suffix}").resolve()
    if args.iterations is None:
        args.iterations = 2 if args.smoke else MAX_ITER
    for name in ("iterations", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; give a number of at least 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    choose_methods(args.methods)  # before anything is drawn or trained
    start = time.monotonic()
    if not args.cost:
        print("[1/4] streets", flush=True)
        draw_streets(args.quickstart / "streets", args.smoke)
    everything, chosen = plan(args)
    teachers = {
        c.family.name: plan_teacher(c.family, args.quickstart, args.smoke) for c in everything
    }
    failed = {}
    if not args.cost:
        print("[2/4] teachers", flush=True)
        needed = [teachers[name] for name in dict.fromkeys(c.family.name for c in chosen)]
        for index, teacher in enumerate(needed):
            train(teacher, needed[index + 1 :])
        for contender in chosen:
            if contender.pool:
                label_pool(contender, teachers[contender.family.name])

        results = Results(args, everything, teachers)
        by_seed = [
            run
            for seed in args.seeds
            for contender in chosen
            for run in contender.runs
            if run.seed == seed
        ]
        ahead = predict(by_seed, measured_speed(by_seed)) / args.jobs
        print(
            f"[3/4] {len(by_seed)} students, {args.jobs} at a time, "
            f"about {format_time(ahead)} of training ahead",
            flush=True,
        )
        failed = train_all(by_seed, args.jobs, results.write)
        print(f"[4/4] cost of a step; {format_time(time.monotonic() - start)} so far", flush=True)
    else:
        for teacher in teachers.values():
            if not teacher.weights.is_file():
                raise FileNotFoundError(
                    f"There is no teacher {teacher.weights}; train it first, by make methods."
                )
        results = Results(args, everything, teachers)
    results.measure_costs(chosen, again=args.cost)
    results.write()
    print(f"\n{(args.output / 'results.md').read_text()}")
    if args.docs:
        for name, place in DOCS.items():
            shutil.copyfile(args.output / name, place)
        report, plot = DOCS["results.md"], DOCS["plot.png"]
        link = os.path.relpath(plot, report.parent)
        report.write_text(report.read_text().replace("(plot.png)", f"({link})"))
    print(
        f"Done in {format_time(time.monotonic() - start)}. Look at {args.output}: results.md, "
        "results.csv, results.json and plot.png."
    )
    if failed:
        raise RuntimeError(f"not every run finished: {'; '.join(failed)} (see above)")


def command() -> int:
    """The experiment of the process's command line; returns the exit code."""
    return run_experiment(main, "compare_methods")


if __name__ == "__main__":
    sys.exit(command())
