"""Data sets of streets: written once, taken up again, known by their provenance."""

import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from hkd_d2.data.streets.difficulty import Difficulty
from hkd_d2.data.streets.street import Street
from hkd_d2.data.text_files import read_json

VERSION = 2  # raised whenever the same parameters would draw other pictures
PROVENANCE = "streets.json"
DEFAULT = Difficulty()
CITIES = {"train": ("ash", "birch", "hazel", "maple"), "val": ("rowan", "willow")}


def generate_streets(
    root: str | Path,
    *,
    num_train: int = 500,
    num_val: int = 200,
    height: int = 192,
    width: int = 320,
    seed: int = 0,
    workers: int = 2,
    difficulty: Difficulty = DEFAULT,
) -> Path:
    """Write a data set of synthetic streets in the on-disk form of CityPersons.

    Picture ``index`` of a split depends on ``(seed, split, index)``, the picture size and the
    difficulty alone, whatever the number of workers. An interrupted run is taken up where it ended,
    and a finished one is left as it is.

    Args:
        root: folder to write; ``leftImg8bit``, ``gtBboxCityPersons`` and the file
            ``streets.json`` with the parameters go there.
        num_train: pictures of the split ``train``.
        num_val: pictures of the split ``val``.
        height: pixels of a picture.
        width: pixels of a picture.
        seed: of the random numbers, not negative.
        workers: processes that draw.
        difficulty: density, contrast and clutter.

    Returns:
        ``root``.

    Raises:
        ValueError: a parameter out of range, or a folder that holds something else: streets of
            other parameters, or files that are not streets.
    """
    for name, value, least in (
        ("num_train", num_train, 0),
        ("num_val", num_val, 0),
        ("height", height, 64),
        ("width", width, 64),
        ("seed", seed, 0),
        ("workers", workers, 1),
    ):
        if value < least:
            raise ValueError(f"{name} of synthetic streets must be at least {least}, got {value}.")
    root = Path(root)
    _claim(
        root,
        {
            "generator": "hkd_d2 synthetic streets",
            "version": VERSION,
            "num_train": num_train,
            "num_val": num_val,
            "height": height,
            "width": width,
            "seed": seed,
            "difficulty": dataclasses.asdict(difficulty),
        },
    )
    wanted = [("train", i) for i in range(num_train)] + [("val", i) for i in range(num_val)]
    jobs = [job for job in wanted if not all(path.exists() for path in street_paths(root, *job))]
    if not jobs:
        print(f"streets: {len(wanted)} pictures are in {root} already")
        return root
    write = functools.partial(
        _write_street, root, seed=seed, height=height, width=width, difficulty=difficulty
    )
    if workers == 1:
        _report(map(write, jobs), len(jobs), root)
    else:
        # "spawn": a forked child would inherit the thread pools of OpenCV and PyTorch half-made.
        context = multiprocessing.get_context("spawn")
        workers = min(workers, len(jobs))
        with context.Pool(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
            _report(pool.imap_unordered(write, jobs, chunksize=8), len(jobs), root)
    return root


def street_paths(root: str | Path, split: str, index: int) -> tuple[Path, Path]:
    """Image file and annotation file of one picture.

    Args:
        root: folder given to :func:`generate_streets`.
        split: ``train`` or ``val``.
        index: from 0.

    Returns:
        PNG and JSON.
    """
    city = CITIES[split][index % len(CITIES[split])]
    stem = f"{city}_{index:06d}_000000"
    return (
        Path(root, "leftImg8bit", split, city, f"{stem}_leftImg8bit.png"),
        Path(root, "gtBboxCityPersons", split, city, f"{stem}_gtBboxCityPersons.json"),
    )


def draw_street(
    *,
    split: str = "train",
    index: int = 0,
    seed: int = 0,
    height: int = 192,
    width: int = 320,
    difficulty: Difficulty = DEFAULT,
) -> tuple[np.ndarray, list[dict], np.ndarray]:
    """Draw one picture.

    Args:
        split: ``train`` or ``val``.
        index: from 0.
        seed: as in :func:`generate_streets`, like the other arguments.

    Returns:
        The picture, uint8 (height, width, 3) BGR; its objects, a list of dicts with
        ``label``, ``instanceId``, ``bbox`` and ``bboxVis`` ([x, y, w, h], int pixels); and the
        owner of each pixel, int32 (height, width): ``1 + i`` where object ``i`` is seen, else 0.
    """
    rng = np.random.default_rng([seed, sorted(CITIES).index(split), index])
    return Street(rng, height, width, difficulty).draw()


def _claim(root: Path, provenance: dict) -> None:
    """Write the provenance file, or check the one that is there."""
    path = root / PROVENANCE
    if path.exists():
        found = read_json(path)
        if not isinstance(found, dict):
            found = {}
        other = sorted(k for k in provenance if found.get(k) != provenance[k])
        if other:
            raise ValueError(
                f"{root} holds streets of other parameters ({', '.join(other)} differ from those "
                f"in {PROVENANCE}): choose another folder or delete this one."
            )
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(
            f"{root} is not an empty folder and has no {PROVENANCE}: choose another folder."
        )
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(provenance, indent=2) + "\n")


def _write_street(
    root: Path, job: tuple[str, int], *, seed: int, height: int, width: int, difficulty: Difficulty
) -> None:
    split, index = job
    image, objects, _ = draw_street(
        split=split, index=index, seed=seed, height=height, width=width, difficulty=difficulty
    )
    annotation = {"imgHeight": height, "imgWidth": width, "objects": objects}
    _, png = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    contents = (png.tobytes(), json.dumps(annotation, indent=1).encode())
    for path, content in zip(street_paths(root, split, index), contents, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(content)
        os.replace(part, path)  # whole or not at all, so that a run can be taken up again


def _report(results: Iterable, total: int, root: Path) -> None:
    step = max(1, total // 10)
    for done, _ in enumerate(results, 1):
        if done % step == 0 or done == total:
            print(f"streets: {done}/{total} pictures in {root}", flush=True)
