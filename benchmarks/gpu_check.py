"""Check and time the CUDA kernels on this machine's GPU, and write one report folder.

    make gpu-check                      or, where there is PyTorch and no Detectron2:
    python -m benchmarks.gpu_check

Needs a CUDA build of PyTorch (2.11 or newer), its toolkit's nvcc, pytest, hypothesis, ninja and
pybind11. Builds the modules here, then

    tests         what only a GPU shows: streams, graphs, determinism, memory, huge tensors
    operators     the CPU kernels' tests over the CUDA kernels, of RoIs by both plans
    memcheck, racecheck, initcheck    of compute-sanitizer, where there is one
    plans         which plan of the RoI operators' backward, HKD_ROI_BACKWARD, is faster, by case
    benchmark     in float32 and bfloat16, against plain PyTorch, torch.compile and torchvision

A step that fails does not keep later ones from running; the exit status tells.
"""

import argparse
import csv
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("build", "tests", "operators", "memcheck", "racecheck", "initcheck")
STEPS += ("plans", "benchmark")
DTYPES = ("float32", "bfloat16")
PLANS = ("gather", "scatter")  # of the RoI operators' backward
ROI_CASES = ("roi_align", "roi_align_adaptive", "roi_distillation", "roi_distillation_adaptive")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS)
    )
    parser.add_argument(
        "--scale", default="full", choices=("full", "half", "tiny"), help="of the benchmark"
    )
    parser.add_argument(
        "--seconds", type=float, default=3, help="a case of the benchmark (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write (docs/benchmarks/<device>-<date>)"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(
            "PyTorch sees no GPU; run it on a machine with one (tests/csrc checks the kernels "
            "without)."
        )
    return args


def sanitizer():
    """compute-sanitizer of the system or of PyPI's nvidia-cuda-sanitizer-api; None without."""
    wheels = Path(sysconfig.get_paths()["purelib"], "nvidia").glob("cu*/bin")
    path = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", *map(str, wheels)])
    return shutil.which("compute-sanitizer", path=path)


def commands(args, out):
    """{step: commands to run one after another}, without what this machine has no tool for."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs"]
    bench = [python, "tools/benchmark_ops.py", "--device", "cuda"]
    bench += ["--scale", args.scale, "--seconds", args.seconds]
    scatter = ["env", "HKD_ROI_BACKWARD=scatter"]
    found = {
        "build": [[python, "setup.py", "build_ext", "--inplace"]],
        "tests": [[*pytest, "-m", "gpu", "tests/ops/test_gpu.py"]],
        "operators": [
            [*pytest, "-m", "not gpu", "-p", "cuda_emulator.operators_on_gpu", "tests/ops"],
            [
                *scatter,
                *pytest,
                "-p",
                "cuda_emulator.operators_on_gpu",
                "tests/ops/test_roi_operators.py",
            ],
        ],
        "plans": [
            [
                *("env", f"HKD_ROI_BACKWARD={plan}", *bench, "--providers", "fused"),
                *("--case", *ROI_CASES, "--csv", plan_csv(out, plan), "--plot", out / "plans.png"),
            ]
            for plan in PLANS
        ],
        "benchmark": [
            [*bench, "--csv", out / "ops.csv", "--dtype", d, "--plot", out / f"ops_{d}.png"]
            for d in DTYPES
        ],
    }
    if tool := sanitizer():
        for step in ("memcheck", "racecheck", "initcheck"):
            check = [tool, "--tool", step, "--error-exitcode", 1]
            found[step] = [[*env, *check, python, "tests/ops/test_gpu.py"] for env in ([], scatter)]
    return found


def execute(commands, log, environment):
    """Run commands until one fails, shown and logged; return whether all succeeded."""
    with open(log, "w", encoding="utf-8") as file:
        for command in commands:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
            if process.wait():
                return False
    return True


def facts():
    """Device and versions."""
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    ).stdout.split("\n")[0]
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def summary(log):
    """The last line that says something: pytest's count, or the sanitizer's."""
    lines = [line.strip("= \n") for line in log.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if re.search(r"\d+ (passed|failed)|ERROR SUMMARY", line)]
    return found[-1] if found else ""


def plan_csv(out, plan):
    return out / f"roi_{plan}.csv"


def plan_table(out):
    """Backward by both plans, as measured last, and which is faster; in markdown."""
    medians = {}
    for plan in PLANS:
        with open(plan_csv(out, plan), newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["mode"] == "backward":
                    case = row["case"], row["layout"]
                    medians.setdefault(case, {})[plan] = float(row["median_ms"])
    lines = [f"| case | layout | {', ms | '.join(PLANS)}, ms | faster |", "|---|---|---:|---:|---|"]
    for (case, layout), of_plan in medians.items():
        gather, scatter = (of_plan[plan] for plan in PLANS)
        faster = min(PLANS, key=of_plan.get)
        ratio = max(gather, scatter) / min(gather, scatter)
        times = f"{gather:.3g} | {scatter:.3g}"
        lines.append(f"| {case} | {layout} | {times} | {faster}, {ratio:.2f}x |")
    return "\n".join(lines)


def tables(log):
    """The markdown tables that the benchmark printed."""
    found = re.findall(r"^\|.*\|$(?:\n\|.*\|$)*", log.read_text(encoding="utf-8"), re.MULTILINE)
    return "\n\n".join(found)


def report(results, about, out):
    """Write report.json and README.md."""
    (out / "report.json").write_text(json.dumps({**about, "steps": results}, indent=1) + "\n")
    lines = [f"# {about['device']}, {about['date']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "| step | result | seconds | |", "|---|---|---:|---|"]
    lines += [
        f"| {step} | {r['result']} | {r['seconds']:.0f} | {r['summary']} |"
        for step, r in results.items()
    ]
    if results.get("plans", {}).get("result") == "passed":
        lines += ["", "HKD_ROI_BACKWARD, backward alone, float32:", "", plan_table(out)]
    log = out / "benchmark.log"
    if log.exists():
        lines += ["", "Forward and backward, medians; batch of two; float32, then bfloat16.", ""]
        lines += [tables(log)]
        lines += [f"\n![ratios, {d}](ops_{d}.png)" for d in DTYPES]
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main(argv=None) -> int:
    args = parse_args(argv)
    about = facts()
    name = re.sub(r"\W+", "-", about["device"].lower())
    out = (args.out or ROOT / "docs" / "benchmarks" / f"{name}-{about['date']}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "FORCE_CUDA": "1",
        # Only this device's architecture: a report is about one machine.
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", about["compute_capability"]),
    }
    possible = commands(args, out)
    results = {}
    for number, step in enumerate(args.steps, 1):
        print(f"\n== {number}/{len(args.steps)} {step}", flush=True)
        start, log = time.monotonic(), out / f"{step}.log"
        if step not in possible:
            results[step] = {"result": "left out", "seconds": 0, "summary": "no compute-sanitizer"}
            print("left out: there is no compute-sanitizer (pip install nvidia-cuda-sanitizer-api)")
            continue
        extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step.endswith("check") else {}
        good = execute(possible[step], log, environment | extra)
        results[step] = {
            "result": "passed" if good else "failed",
            "seconds": round(time.monotonic() - start, 1),
            "summary": summary(log),
        }
        if step == "plans" and good:
            print(f"\n{plan_table(out)}")
        report(results, about, out)
    report(results, about, out)
    print(f"\nreport: {out}")
    return int(any(r["result"] == "failed" for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
