"""Pre-training methods on one small task: pictures of glyphs, a training each, and their table."""

import csv
import json
import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from experiments.runs import CONFIGS, flatten, read_config
from experiments.scores import mean_and_error
from hkd_d2.distillation.glyphs import draw_glyphs
from hkd_d2.files import write_text, written_beside
from hkd_d2.pretraining.training import METHODS, pretrain

CONFIG = CONFIGS / "pretraining" / "glyphs.yaml"
# The task, ours: classes, and images of each to train on and to be right about.
CLASSES = 40
IMAGES = {"train": 15, "val": 50}
TASK_SEED = 0


def draw_task(folder: Path) -> None:
    """Write the pictures as ``<split>/<class>/<number>.png``, 16 x 16 grey, unless they are there.

    Raises:
        ValueError: the folder holds something else, or a part of them.
    """
    expected = CLASSES * sum(IMAGES.values())
    if folder.exists():
        found = len(list(folder.glob("*/*/*.png")))
        if found != expected:
            raise ValueError(
                f"'{folder}' holds {found} of {expected} pictures; remove it or choose another "
                "--output."
            )
        return
    generator = torch.Generator().manual_seed(TASK_SEED)
    for split, number in IMAGES.items():
        classes = torch.arange(CLASSES).repeat_interleave(number)
        pictures = draw_glyphs(classes, CLASSES, generator)
        pixels = (64 + 128 * pictures[:, 0]).clamp(0, 255).to(torch.uint8).numpy()
        for index, (label, image) in enumerate(zip(classes.tolist(), pixels, strict=True)):
            place = folder / split / f"{label:02}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{index % number:02}.png")


def plan_run(method: str, seed: int, output: Path, options: list) -> CfgNode:
    folder = output / "runs" / f"{method}_seed{seed}"
    cfg = read_config(CONFIG, options)
    own = ["HKD.PRETRAINING.METHOD", method, "HKD.PRETRAINING.ROOT", str(output / "glyphs")]
    cfg.merge_from_list([*own, "SEED", seed, "OUTPUT_DIR", str(folder)])
    return cfg


def settings(cfg: CfgNode) -> dict:
    """All that decides the outcome, but for the places."""
    node = flatten(cfg.HKD.PRETRAINING)
    del node["ROOT"]
    task = {"classes": CLASSES, "images": IMAGES, "task seed": TASK_SEED, "seed": cfg.SEED}
    return json.loads(json.dumps({**node, **task}))


def finished(cfg: CfgNode) -> dict | None:
    """The record of a run that is there with these settings."""
    file = Path(cfg.OUTPUT_DIR) / "result.json"
    record = json.loads(file.read_text()) if file.is_file() else None
    return record if record and record["settings"] == settings(cfg) else None


def run(cfg: CfgNode) -> dict:
    """Train; the record has settings, shares of images named rightly, and seconds."""
    start = time.monotonic()
    found = pretrain(cfg)
    record = {"settings": settings(cfg), **found, "seconds": time.monotonic() - start}
    write_text(Path(cfg.OUTPUT_DIR) / "result.json", json.dumps(record, indent=1))
    return record


def run_all(plans: list[CfgNode], jobs: int) -> list[dict]:
    """The records of ``plans``, in their order; what is not there is trained, with a line each."""
    records = [finished(cfg) for cfg in plans]
    missing = [i for i, record in enumerate(records) if record is None]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start_worker, (threads,)) as pool:
        futures = {i: pool.submit(run, plans[i]) for i in missing}
        for number, (i, future) in enumerate(futures.items(), 1):
            records[i] = future.result()
            print(
                f"  [{number}/{len(missing)}] {Path(plans[i].OUTPUT_DIR).name}: "
                f"{100 * records[i]['student']:.1f} % in {records[i]['seconds']:.0f} s",
                flush=True,
            )
    return records


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    # Several train at once; the caller says one line when each ends.
    logging.getLogger("hkd_d2").setLevel(logging.WARNING)


def summarise(records: list[dict]) -> list[dict]:
    """One entry a method: seeds, accuracies in percent, and gains paired by seed.

    ``labels`` and ``kd`` are mean and standard error of the differences to these two methods.
    """
    by_method = {}
    for record in records:
        by_method.setdefault(record["settings"]["METHOD"], {})[record["settings"]["seed"]] = record
    entries = []
    for method in sorted(by_method, key=METHODS.index):
        mine = by_method[method]
        students = {seed: 100 * record["student"] for seed, record in mine.items()}
        entry = {"method": method, "seeds": sorted(mine)}
        entry["student"] = mean_and_error(list(students.values()))
        others = [100 * r[k] for r in mine.values() for k in ("teacher", "peer") if k in r]
        entry["other"] = mean_and_error(others) if others else None
        for base in ("labels", "kd"):
            theirs = by_method.get(base, {}) if base != method else {}
            gains = [students[s] - 100 * theirs[s]["student"] for s in students if s in theirs]
            entry[base] = mean_and_error(gains) if gains else None
        entry["seconds"] = float(np.mean([record["seconds"] for record in mine.values()]))
        entries.append(entry)
    return entries


def format_table(entries: list[dict]) -> str:
    lines = [
        "| method | seeds | student | teacher or peer | - labels | - kd | seconds a run |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        cells = [entry["method"], ", ".join(map(str, entry["seeds"]))]
        cells += [show(entry["student"]), show(entry["other"])]
        cells += [show(entry[base], "+") for base in ("labels", "kd")]
        cells.append(f"{entry['seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(value: tuple[float, float | None] | None, sign: str = "") -> str:
    if value is None:
        return ""
    mean, error = value
    return f"{mean:{sign}.2f}" + (f" ± {error:.2f}" if error is not None else "")


def write_csv(records: list[dict], path: Path) -> None:
    """One line a run: method, seed, accuracies in percent, seconds."""
    with written_beside(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", "student", "teacher_or_peer", "seconds"])
        for record in records:
            other = record.get("teacher", record.get("peer"))
            line = [record["settings"]["METHOD"], record["settings"]["seed"]]
            line += [round(100 * record["student"], 2)]
            line += ["" if other is None else round(100 * other, 2), round(record["seconds"], 1)]
            writer.writerow(line)
