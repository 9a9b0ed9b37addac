"""Labels, KD, HSAKD and HSSAKD on one small classification task, over several seeds.

    python -m experiments.compare_pretraining or    make pretraining
    python -m experiments.compare_pretraining --docs     copy the results into docs/ as well

Draws pictures of glyphs, trains a small classifier by every method and writes the table;
configs/pretraining/glyphs.yaml has networks and schedule. What an earlier call finished is used
again, unless its settings changed.
"""

import hkd_d2._requirements  # noqa: F401  isort: skip
import hkd_d2._quiet  # noqa: F401  isort: skip

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from experiments.command import run_experiment
from experiments.pretraining import (
    CLASSES,
    CONFIG,
    IMAGES,
    draw_task,
    format_table,
    plan_run,
    run_all,
    summarise,
    write_csv,
)
from experiments.runs import ROOT, parse_seeds
from hkd_d2.files import write_text
from hkd_d2.pretraining.training import METHODS


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        type=lambda text: [name for name in text.split(",") if name],
        default=list(METHODS),
        help=f"[{','.join(METHODS)}]",
    )
    parser.add_argument("--seeds", type=parse_seeds, default=[0, 1, 2], help="[0,1,2]")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time [%(default)s]"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "pretraining")
    parser.add_argument("--docs", action="store_true", help="copy the results into docs/")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; give at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"'{unknown[0]}' is no method; choose from {', '.join(METHODS)}.")
    output = args.output.resolve()
    plans = [plan_run(m, s, output, args.opts) for s in args.seeds for m in args.methods]
    draw_task(output / "glyphs")
    print(f"{len(plans)} runs, {args.jobs} at a time", flush=True)
    records = run_all(plans, args.jobs)
    node = plans[0].HKD.PRETRAINING
    text = [
        "# Pre-training methods on glyphs",
        "Written by `make pretraining`; [Methods](../methods.md) says what each computes.",
        format_table(summarise(records)),
        f"- {CLASSES} classes of glyphs (`hkd_d2/distillation/glyphs.py`), {IMAGES['train']} "
        f"images of each to train on, {IMAGES['val']} to be scored on; "
        f"`{CONFIG.relative_to(ROOT)}`: {node.TEACHER} teaches {node.STUDENT}, {node.EPOCHS} "
        "epochs for every training. Percent "
        "of the images named rightly at the end: mean and standard error over seeds; differences "
        "are paired by seed, whose student starts alike and sees the same images in one order.",
        "- kd and hsakd have one teacher a seed, trained by labels; hsakd's branches are trained "
        "on its frozen body. hssakd's peer is a network of the teacher's kind, trained with the "
        "student. Schedule and size of the task were chosen by labels alone, by its first seed.",
        f"- Seconds are of a whole run with its teacher, {args.jobs} at a time beside other work: "
        "an order of magnitude. hsakd and hssakd see every image in its four turns. On "
        f"{plans[0].MODEL.DEVICE}, PyTorch {torch.__version__}.",
    ]
    text = "\n\n".join([*text[:3], "\n".join(text[3:])]) + "\n"
    write_text(output / "results.md", text)
    write_csv(records, output / "results.csv")
    print(f"\n{text}")
    if args.docs:
        for suffix in ("md", "csv"):
            place = ROOT / "docs" / "benchmarks" / f"pretraining.{suffix}"
            shutil.copyfile(output / f"results.{suffix}", place)


def command() -> int:
    """The experiment of the process's command line; returns the exit code."""
    return run_experiment(main, "compare_pretraining")


if __name__ == "__main__":
    sys.exit(command())
