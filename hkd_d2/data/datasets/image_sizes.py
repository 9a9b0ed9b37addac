"""Sizes of images, for annotations that do not state them: read once, then remembered.

A header is read in a moment, but there may be tens of thousands on a slow disk, before every run.
``$HKD_D2_CACHE`` (``~/.cache/hkd_d2`` without that variable) has one JSON file for each folder of
images. An entry holds as long as the image has the same length and time of change.
Whatever is wrong with the file, or with writing it, only costs the reading.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

from ..image_files import image_size
from .cache import cache_folder
from .records import check_images_exist


def image_sizes(folder: str, names: list[str], source: str) -> list[tuple[int, int]]:
    """(height, width) of each image, as Detectron2 reads it.

    Args:
        folder, names: the images are ``folder/name``.
        source: names the annotations in messages.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: a file is no image.
    """
    paths = [os.path.join(folder, name) for name in names]
    check_images_exist([{"file_name": path} for path in paths], source)
    known = _read(folder)
    with ThreadPoolExecutor() as pool:
        stamps = list(pool.map(_stamp, paths))
        new = [
            i
            for i, (name, stamp) in enumerate(zip(names, stamps, strict=True))
            if known.get(name, [])[:2] != stamp
        ]
        for i, size in zip(new, pool.map(image_size, [paths[i] for i in new]), strict=True):
            known[names[i]] = [*stamps[i], *size]
    if new:
        with contextlib.suppress(OSError):
            _write(folder, known)
    return [tuple(known[name][2:]) for name in names]


def _stamp(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _cache_file(folder: str) -> str:
    digest = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]
    return os.path.join(cache_folder(), f"image_sizes_{digest}.json")


def _read(folder: str) -> dict[str, list[int]]:
    """Length, time of change, height and width by name; empty where the file is not ours."""
    try:
        with open(_cache_file(folder), encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        name: entry
        for name, entry in content.items()
        if isinstance(entry, list) and len(entry) == 4 and all(type(v) is int for v in entry)
    }


def _write(folder: str, content: dict[str, list[int]]) -> None:
    path = _cache_file(folder)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Under another name first: a reader never sees half a file.
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=os.path.dirname(path), delete=False
    ) as f:
        json.dump(content, f, separators=(",", ":"))
    os.replace(f.name, path)
