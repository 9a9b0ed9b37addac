"""Whole detectors side by side: weight, latency, throughput, memory and miss rate."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from hkd_d2.evaluation import coco_ground_truth, evaluate_miss_rate
from hkd_d2.evaluation.miss_rate import PEDESTRIAN
from hkd_d2.inference import Detector
from hkd_d2.modeling.summary import count_flops, count_parameters

# Ours. Rounds before those that count: Detectron2's scripted functions are compiled again in some
# of the first calls, which then take a second. And seconds between two detectors: a runtime's
# threads wait for more work in a loop for a while, and would slow down the next one.
WARM_UP = 10
PAUSE = 0.1
SETUPS = ("Reasonable", "Reasonable_occ=heavy", "All")


def time_detectors(
    detectors: Mapping[str, Detector],
    images: Sequence[np.ndarray],
    batches: Sequence[int],
    rounds: int,
) -> dict[str, dict[int, list[float]]]:
    """Seconds of ``detect`` from decoded images to boxes, the detectors taking turns.

    A disturbance meets all of them, and each goes first as often as the others.

    Args:
        detectors: by name.
        images: uint8 RGB of one size; a call takes as many as its batch has, in turn.
        batches: numbers of images a call.
        rounds: calls that count, of each detector and batch.

    Returns:
        dict: by name and batch the seconds of each call.
    """
    samples = {name: {batch: [] for batch in batches} for name in detectors}
    names = list(detectors)
    for turn in tqdm(range(-WARM_UP, rounds), unit="round", disable=None, desc="latency"):
        first = turn % len(names)
        for batch in batches:
            shown = [images[(turn * batch + i) % len(images)] for i in range(batch)]
            for name in names[first:] + names[:first]:
                time.sleep(PAUSE)
                detectors[name].detect(shown)  # its threads are awake, as under a steady load
                start = time.perf_counter()
                detectors[name].detect(shown)
                if turn >= 0:
                    samples[name][batch].append(time.perf_counter() - start)
    return samples


def summarise_times(samples: Mapping[int, Sequence[float]]) -> dict[str, dict]:
    """Median and 90th percentile in milliseconds, and images a second, by the batch as a string."""
    return {
        str(batch): {
            "p50_ms": 1e3 * float(np.percentile(seconds, 50)),
            "p90_ms": 1e3 * float(np.percentile(seconds, 90)),
            "images_per_s": batch / float(np.percentile(seconds, 50)),
        }
        for batch, seconds in samples.items()
    }


def peak_memory(path: str, images: Sequence[str], threads: int, **options) -> dict:
    """See :mod:`hkd_d2.inference.peak_memory`, which runs in a process of its own.

    Raises:
        RuntimeError: that process failed.
    """
    arguments = {"path": path, "images": list(images), "threads": threads, **options}
    done = subprocess.run(
        [sys.executable, "-m", "hkd_d2.inference.peak_memory", json.dumps(arguments)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"'{path}' failed while its memory was measured: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def score_detector(
    detector: Detector,
    records: Sequence[dict],
    *,
    pedestrian: int = 0,
    missing_point: str = "official",
    name: str = "detector",
) -> dict[str, float | None]:
    """MR^-2 in percent by setup, None where a setup has nothing to find.

    Args:
        records: see :func:`hkd_d2.evaluation.coco_ground_truth`; the images are read here.
        pedestrian: index of the class in the detector's list.
        missing_point: see :data:`hkd_d2.evaluation.MISSING_POINTS`.
        name: for the line of progress.
    """
    rows, step = [], detector.batch_size
    for start in tqdm(range(0, len(records), step), disable=None, desc=f"miss rate, {name}"):
        part = records[start : start + step]
        for record, found in zip(
            part, detector.detect([r["file_name"] for r in part]), strict=True
        ):
            keep = found.classes == pedestrian
            boxes = found.boxes[keep].astype(np.float64)
            boxes[:, 2:] -= boxes[:, :2]
            for box, score in zip(boxes.tolist(), found.scores[keep].tolist(), strict=True):
                row = {"image_id": record["image_id"], "category_id": PEDESTRIAN}
                rows.append({**row, "bbox": box, "score": score})
    results = evaluate_miss_rate(coco_ground_truth(list(records)), rows, SETUPS, missing_point)
    return {
        setup: result.miss_rate if result.num_ground_truth else None
        for setup, result in results.items()
    }


def weigh_detectors(detectors: Mapping[str, Detector], size: tuple[int, int]) -> dict[str, dict]:
    """Parameters and 1e9 multiply-adds for one image of ``size`` (height, width), by name.

    An .onnx is its weights' network: it has the numbers of the detector with the same
    ``weights_sha256``, and None where that one is not among the detectors.
    """
    nothing = {"parameters": None, "gflops": None}
    by_weights = {}
    for detector in detectors.values():
        if hasattr(detector, "model"):
            by_weights[detector.metadata["weights_sha256"]] = {
                "parameters": count_parameters(detector.model)["total"],
                "gflops": count_flops(detector.model, size)["total"],
            }
    return {
        name: by_weights.get(detector.metadata.get("weights_sha256"), nothing)
        for name, detector in detectors.items()
    }


# ------------------------------------------------------------------------------------------ report
def format_table(rows: Sequence[dict]) -> str:
    """The rows of a benchmark as a Markdown table."""
    batches = list(rows[0]["latency"])
    head = ["model", "parameters (M)", "GFLOPs", "file (MB)"]
    for batch in batches:
        head += [f"p50 / p90 at batch {batch} (ms)"]
    head += [f"images/s at batch {batches[-1]}", "peak memory (MB)"]
    head += [f"MR^-2 {setup}" for setup in rows[0]["miss_rate"]]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        cells = [
            row["model"],
            _cell(row["parameters"], 1e6, "{:.2f}"),
            _cell(row["gflops"], 1, "{:.2f}"),
            _cell(row["file_bytes"], 1e6, "{:.2f}"),
        ]
        for batch in batches:
            times = row["latency"][batch]
            cells.append(f"{times['p50_ms']:.1f} / {times['p90_ms']:.1f}")
        cells.append(f"{row['latency'][batches[-1]]['images_per_s']:.1f}")
        cells.append(_cell(row["gpu_bytes"] or row["resident_bytes"], 1e6, "{:.0f}"))
        cells += [_cell(value, 1, "{:.2f}") for value in row["miss_rate"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value, unit, form):
    return "" if value is None else form.format(value / unit)
