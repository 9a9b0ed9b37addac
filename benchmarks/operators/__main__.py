"""Time the distillation operators against plain PyTorch, torch.compile and what is usually written.

    python tools/benchmark_ops.py                          every case at half scale
    python tools/benchmark_ops.py --scale full --case roi_distillation imitation_masked
    python tools/benchmark_ops.py --list

Providers of a case are timed in one process, round by round. Each result is compared with the
reference first. Rows are added to a CSV; the table and the picture show this run alone.

On a CPU everything runs twice, in processes of their own: with glibc's malloc told to keep freed
memory (the table), since the page faults of fresh memory would hide everything else, and with
malloc as it is, without torch.compile (the column "default malloc").
"""

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.operators import measure, report
from benchmarks.operators.cases import CASES, SCALES
from benchmarks.operators.run import PROVIDERS, Differs, run
from hkd_d2.cli.errors import guard
from hkd_d2.devices import device_name

ROOT = Path(__file__).resolve().parents[2]
MALLOC = {
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"},
    "default": {},
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="name the cases and leave")
    parser.add_argument("--case", nargs="+", default=list(CASES), metavar="NAME", help="these only")
    parser.add_argument(
        "--providers",
        nargs="+",
        default=list(PROVIDERS),
        metavar="NAME",
        help=f"out of {', '.join(PROVIDERS)} (default: all)",
    )
    parser.add_argument(
        "--scale",
        choices=list(SCALES),
        default="half",
        help="full is 1024x2048 pixels; tiny is for a try, its figures mean nothing (default: "
        "%(default)s)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of maps and logits (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument(
        "--malloc",
        choices=(*MALLOC, "both"),
        default="both",
        help="how the CPU's memory is allocated (default: both, one after the other)",
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="of rounds a case (default: %(default)s)"
    )
    parser.add_argument(
        "--csv", type=Path, default=ROOT / "docs/benchmarks/ops.csv", help="to append to"
    )
    parser.add_argument(
        "--plot", type=Path, help="PNG to write (default: beside the CSV, by device and scale)"
    )
    parser.add_argument("--child", metavar="DATE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    for option, known in (("case", CASES), ("providers", PROVIDERS)):
        unknown = [name for name in getattr(args, option) if name not in known]
        if unknown:
            parser.error(f"--{option} {unknown[0]}: unknown; choose from {', '.join(known)}.")
    if args.threads < 1:
        parser.error(f"--threads {args.threads}: give at least 1.")
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds:g}: give more than 0.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU; leave it out to run on the CPU.")
    if args.plot is None:
        half = "" if args.dtype == "float32" else f"_{args.dtype}"
        args.plot = args.csv.with_name(f"ops_{args.device}_{args.scale}{half}.png")
    try:
        report.check(args.csv)
    except ValueError as error:
        parser.error(str(error))
    if not args.plot.parent.is_dir():
        parser.error(f"--plot {args.plot}: its folder is missing; make it first.")
    return args


def run_child(args) -> int:
    """Measure under the malloc setting of this process, and append to the CSV case by case."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    facts = {
        "date": args.child,
        "device": device_name(device),
        "instruction_set": measure.instruction_set() if args.device == "cpu" else "",
        "threads": args.threads,
        "torch": torch.__version__,
        "commit": measure.commit(),
        "malloc": args.malloc,
        "scale": args.scale,
    }
    names = [name for name in CASES if name in args.case]

    def say(line):
        print(line, flush=True)

    try:
        dtype = getattr(torch, args.dtype)
        for rows in run(names, args.scale, device, dtype, args.providers, args.seconds, say):
            report.append(args.csv, [facts | row for row in rows])
    except Differs as error:
        print(f"benchmark_ops: {error}", file=sys.stderr)
        return 1
    return 0


def run_parent(args, argv) -> int:
    """A child process for each malloc setting, then the table and the picture."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # The default's column is about the fused operators; compiling again would take minutes.
    plain = [p for p in args.providers if p != "compile"]
    if args.device == "cuda":
        passes = {"default": args.providers}
    elif args.malloc == "both":
        passes = {"tuned": args.providers} | ({"default": plain} if plain else {})
    else:
        passes = {args.malloc: args.providers}
    outside = {k: v for k, v in os.environ.items() if k not in MALLOC["tuned"]}
    for setting, providers in passes.items():
        print(f"malloc: {setting}", flush=True)
        own = ["--malloc", setting, "--providers", *providers, "--child", date]
        environment = outside | MALLOC[setting] | {"OMP_NUM_THREADS": str(args.threads)}
        code = subprocess.run([sys.executable, __file__, *argv, *own], env=environment).returncode
        if code:
            return code
    rows = report.read(args.csv, date)
    if not rows:
        print("benchmark_ops: none of these providers has any of these cases.", file=sys.stderr)
        return 1
    bandwidth = [max(row[f"{way}_gb_per_s"] for row in rows) for way in ("read", "write")]
    print(f"\n{report.table(rows)}\n")
    print(
        f"{rows[0]['device']}, {args.threads} threads, {args.scale} scale; "
        f"reads {bandwidth[0]:.1f} GB/s, writes {bandwidth[1]:.1f} GB/s; rows added to {args.csv}"
    )
    try:
        report.plot(rows, args.plot)
        print(f"picture: {args.plot}")
    except ModuleNotFoundError as error:
        print(f"no picture: {error}")
    return 0


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.list:
        for name, case in CASES.items():
            print(f"{name:<28}{case.operator}: {case.about}")
        return 0
    return run_child(args) if args.child else run_parent(args, argv)


def command() -> int:
    """The benchmark of the process's command line; returns the exit code."""
    return guard(main, "benchmark_ops.py")


if __name__ == "__main__":
    sys.exit(command())
