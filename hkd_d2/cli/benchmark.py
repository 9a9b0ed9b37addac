"""Compare detectors: parameters, GFLOPs, file size, latency, throughput, memory, miss rate.

    hkd benchmark --data citypersons output/quickstart/streets val \\
        --model teacher=output/quickstart/teacher/model_final.pth \\
        --model student=output/quickstart/hkd_seed0/model_final.pth --model student.onnx

Every model is loaded into one process, and they take turns. Latency is that of detect(images), from
decoded images to boxes. Peak memory is that of a process of its own for each model. Writes
results.json, results.md and accuracy_latency.png. Let nothing else run meanwhile.
"""

import argparse
import datetime
import json
import os
from pathlib import Path

from hkd_d2 import __version__
from hkd_d2.cli.arguments import (
    add_data,
    add_device,
    add_missing_point,
    add_models,
    data_name,
    named_backend,
    named_configs,
    named_files,
)

TIMED_IMAGES = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser)
    add_data(parser, "--data", "images of the miss rate", required=True)
    add_device(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="[PyTorch's choice]")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], metavar="N", help="images a call [1 8]"
    )
    parser.add_argument(
        "--rounds", type=int, default=30, metavar="N", help="timed calls of each [%(default)s]"
    )
    parser.add_argument("--images", type=int, metavar="N", help="score the first N images [all]")
    parser.add_argument("--pedestrian", metavar="CLASS", help="name of the class [a model's first]")
    add_missing_point(parser)
    parser.add_argument(
        "--out", metavar="DIR", default="output/benchmark_model", help="[%(default)s]"
    )


def run(args: argparse.Namespace) -> int:
    from hkd_d2.inference.benchmark import SETUPS, format_table
    from hkd_d2.visualization.latency import plot_accuracy_latency

    numbers = {"--batches": args.batches, "--rounds": [args.rounds]}
    numbers["--threads"] = [1 if args.threads is None else args.threads]
    numbers["--images"] = [1 if args.images is None else args.images]
    for name, values in numbers.items():
        if min(values) < 1:
            raise ValueError(f"{name} is {min(values)}; give 1 or more.")
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
    print(report)
    print(f"wrote results.json, results.md and accuracy_latency.png in {out}")
    return 0


def class_index(name: str | None, detector, model: str) -> int:
    if name is None:
        return 0
    if name not in detector.class_names:
        raise ValueError(
            f"{model} has no class '{name}'; choose from {', '.join(detector.class_names)}."
        )
    return detector.class_names.index(name)


def benchmark(args: argparse.Namespace) -> dict:
    """All numbers, ready for JSON."""
    import torch

    from hkd_d2.data.datasets import check_records
    from hkd_d2.devices import device_name
    from hkd_d2.inference import read_image
    from hkd_d2.inference.benchmark import (
        peak_memory,
        score_detector,
        summarise_times,
        time_detectors,
        weigh_detectors,
    )
    from hkd_d2.inference.peak_memory import load_for_timing

    threads = args.threads or torch.get_num_threads()
    files = named_files(args.model)
    configs = named_configs(args.config_file or [], list(files))
    data = data_name(args.data)
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
        name: load_for_timing(file, threads, **options[name]) for name, file in files.items()
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
                **peak_memory(file, paths, threads, **options[name]),
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
        "version": __version__,
        "torch": torch.__version__,
        "device": device_name(torch.device(args.device)),
        "threads": threads,
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
        f"hkd_d2 {content['version']}. Images of {width}x{height}; median and 90th percentile of "
        f"{content['rounds']} calls, the models taking turns. Peak memory: of a process that runs "
        f"the model alone, largest batch. MR^-2 in percent on {content['num_images']} images "
        f"({content['data']}; missing reference points: {content['missing_point']}). GFLOPs: 1e9 "
        "multiply-adds for one image. File: as it lies on the disk; a training checkpoint has the "
        "optimizer's state too."
    )
