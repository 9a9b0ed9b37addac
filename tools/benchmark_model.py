#!/usr/bin/env python
"""Detectors side by side: parameters, GFLOPs, file size, latency, throughput, memory, miss rate.

    python tools/benchmark_model.py --data citypersons output/quickstart/streets val \\
        teacher=output/quickstart/teacher/model_final.pth \\
        student=output/quickstart/hkd_seed0/model_final.pth student_onnx=student.onnx

Every model is loaded into one process, and they take turns. Latency is that of detect(images), from
decoded images to boxes. Peak memory is that of a process of its own for each model. Writes
results.json, results.md and accuracy_latency.png. Let nothing else run meanwhile.
"""

import hkd_d2._quiet  # noqa: F401  isort: skip
import hkd_d2._requirements  # noqa: F401  isort: skip

import argparse
import datetime
import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.operators.measure import commit, device_name
from hkd_d2.data.datasets import check_records
from hkd_d2.data.datasets.register import FOLDERS, register_dataset
from hkd_d2.evaluation import MISSING_POINTS
from hkd_d2.inference import read_image
from hkd_d2.inference.arguments import named_backend, named_configs, named_models
from hkd_d2.inference.benchmark import (
    SETUPS,
    format_table,
    peak_memory,
    plot_accuracy_latency,
    score_detector,
    summarise_times,
    time_detectors,
    weigh_detectors,
)
from hkd_d2.inference.peak_memory import load_for_timing

TIMED_IMAGES = 32


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]FILE",
        help=".pth, .safetensors, .onnx, .pt2 or .ts; the last two are programs",
    )
    parser.add_argument(
        "--data",
        nargs=3,
        required=True,
        metavar=("FORMAT", "SOURCE", "PART"),
        help=f"coco FILE IMAGES, or a format out of {', '.join(FOLDERS)} with its root and split",
    )
    parser.add_argument(
        "--config-file",
        action="append",
        metavar="[NAME=]FILE",
        help="config of a model where none lies beside its weights",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], help="images a call (default: 1 8)"
    )
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each (default: 30)")
    parser.add_argument(
        "--images", type=int, metavar="N", help="score the first N images; default: all"
    )
    parser.add_argument(
        "--pedestrian", metavar="CLASS", help="name of the class; default: a model's first"
    )
    parser.add_argument(
        "--missing-point", choices=list(MISSING_POINTS), default="official", help="of the miss rate"
    )
    parser.add_argument(
        "--out", metavar="DIR", default="output/benchmark_model", help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    numbers = {"--threads": [args.threads], "--batches": args.batches, "--rounds": [args.rounds]}
    numbers["--images"] = [1 if args.images is None else args.images]
    for name, values in numbers.items():
        if min(values) < 1:
            raise ValueError(f"{name} is {min(values)}; give 1 or more.")
    return args


def class_index(name: str | None, detector, model: str) -> int:
    if name is None:
        return 0
    if name not in detector.class_names:
        raise ValueError(
            f"{model} has no class '{name}'; choose from {', '.join(detector.class_names)}."
        )
    return detector.class_names.index(name)


def benchmark(args) -> dict:
    """All numbers, ready for JSON."""
    files = named_models(args.models)
    configs = named_configs(args.config_file or [], list(files))
    form, source, part = args.data
    data = f"{form} {source} {part}"
    register_dataset(data, form, source, part)
    records = check_records(data)[: args.images]
    batches = sorted(set(args.batches))
    options = {
        name: {
            "backend": named_backend(file),
            "config_file": configs.get(name),
            "device": args.device,
            "batch_size": batches[-1],
        }
        for name, file in files.items()
    }
    detectors = {
        name: load_for_timing(file, args.threads, **options[name]) for name, file in files.items()
    }
    classes = {n: class_index(args.pedestrian, d, n) for n, d in detectors.items()}
    # Images of one size, so that a call is one batch.
    first = read_image(records[0]["file_name"])
    timed = [r for r in records if (r["height"], r["width"]) == first.shape[:2]][:TIMED_IMAGES]
    images = [read_image(record["file_name"]) for record in timed]
    sizes = {name: detector.input_shape(*first.shape[:2]) for name, detector in detectors.items()}
    weights = {name: weigh_detectors(detectors, size)[name] for name, size in sizes.items()}
    samples = time_detectors(detectors, images, batches, args.rounds)
    rows = []
    for name, file in files.items():
        paths = [timed[i % len(timed)]["file_name"] for i in range(batches[-1])]
        rows.append(
            {
                "model": name,
                "file": file,
                "file_bytes": os.path.getsize(file),
                **weights[name],
                "latency": summarise_times(samples[name]),
                **peak_memory(file, paths, args.threads, **options[name]),
                "miss_rate": score_detector(
                    detectors[name],
                    records,
                    pedestrian=classes[name],
                    missing_point=args.missing_point,
                    name=name,
                ),
            }
        )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "device": device_name(torch.device(args.device)),
        "threads": args.threads,
        "rounds": args.rounds,
        "data": data,
        "num_images": len(records),
        "image_size": list(first.shape[:2]),
        "seen_sizes": sorted(map(list, set(sizes.values()))),
        "missing_point": args.missing_point,
        "rows": rows,
    }


def notes(content: dict) -> str:
    height, width = content["image_size"]
    return (
        f"{content['device']}, {content['threads']} threads, PyTorch {content['torch']}, "
        f"{content['commit']}. Images of {width}x{height}; median and 90th percentile of "
        f"{content['rounds']} calls, the models taking turns. Peak memory: of a process that runs "
        f"the model alone, largest batch. MR^-2 in percent on {content['num_images']} images "
        f"({content['data']}; missing reference points: {content['missing_point']}). GFLOPs: 1e9 "
        "multiply-adds for one image. File: as it lies on the disk; a training checkpoint has the "
        "optimizer's state too."
    )


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        out = Path(args.out)
        content = benchmark(args)
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(
            json.dumps(content, indent=1, allow_nan=False), encoding="utf-8"
        )
        report = f"{format_table(content['rows'])}\n\n{notes(content)}\n"
        (out / "results.md").write_text(report, encoding="utf-8")
        title = f"{content['device']}, {content['threads']} threads"
        plot_accuracy_latency(content["rows"], out / "accuracy_latency.png", SETUPS[0], title)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"benchmark_model: {error}", file=sys.stderr)
        return 2
    print(report)
    print(f"wrote results.json, results.md and accuracy_latency.png in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
