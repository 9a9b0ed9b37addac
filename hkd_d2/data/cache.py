"""Parsed data sets on disk, so that thousands of annotation files are not parsed in every run.

A cache file holds the records of one split and a key made of the path, size and time of change of
every source, and of the code that parsed them; where the key differs, the sources are parsed again.
It is JSON, one file a split, in ``$HKD_D2_CACHE`` (``~/.cache/hkd_d2`` without that variable); the
folder may be deleted at any time.
"""

import glob
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable

from detectron2.structures import BoxMode

logger = logging.getLogger(__name__)


def cached_records(
    name: str,
    root: str,
    sources: Iterable[str],
    parse: Callable[[], list[dict]],
    *,
    images: bool = False,
) -> list[dict]:
    """Records from the cache where the sources have not changed, else from ``parse``.

    A cache that is stale or damaged is made anew with one line in the log; one that cannot be
    written is done without.

    Args:
        name: of the data set and split, for the file's name.
        root: folder of the data set, an absolute path, as those of the records are; each has a
            cache of its own.
        sources: every file that ``parse`` reads. Where one is missing ``parse`` is called, which
            says so.
        parse: returns records (see :mod:`hkd_d2.data.datasets.records`), with XYWH_ABS boxes.
        images: ``parse`` reads the images' sizes from the images, which are sources too.
    """
    key = _stamp([*_code(), *sources])
    if key is None:
        return parse()
    place = hashlib.sha256(os.fsencode(root)).hexdigest()[:12]
    path = os.path.join(cache_folder(), f"{name}-{place}.json")
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as f:
                content = json.load(f)
            records = content["records"]
            if content["key"] == key and (not images or content["images"] == _images(records)):
                return [_to_record(record) for record in records]
            logger.info(f"{path}: the data set or its loader has changed; parsing {root} again.")
        except (OSError, ValueError, TypeError, LookupError) as error:
            logger.warning(f"{path}: the cache is damaged ({error}); parsing {root} again.")
    records = parse()
    content = {"key": key, "images": _images(records) if images else None, "records": records}
    try:
        os.makedirs(cache_folder(), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as part:  # whole or not at all
            part = os.path.join(part, name)
            with open(part, "w", encoding="utf-8") as f:
                f.write(json.dumps(content, separators=(",", ":")))  # json.dump is slower
            os.replace(part, path)
    except OSError as error:
        logger.warning(f"{path}: the cache cannot be written ({error}).")
    return records


def cache_folder() -> str:
    """The folder of what need not be computed twice."""
    return os.path.expanduser(os.getenv("HKD_D2_CACHE") or os.path.join("~", ".cache", "hkd_d2"))


def _code() -> list[str]:
    folder = os.path.dirname(__file__)
    files = glob.glob(os.path.join(glob.escape(folder), "datasets", "*.py"))
    readers = ("annotation_rules", "cache", "image_files", "images", "text_files")
    files += [os.path.join(folder, f"{name}.py") for name in readers]
    return sorted(files)


def _images(records: list[dict]) -> str | None:
    return _stamp(record["file_name"] for record in records)


def _stamp(paths: Iterable[str]) -> str | None:
    """Differs where a file has changed; None where one is missing."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # ValueError: no file can have this name
            return None
        digest.update(os.fsencode(path))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _to_record(record: dict) -> dict:
    for row in record["annotations"]:
        row["bbox_mode"] = BoxMode(row["bbox_mode"])  # JSON has its number
    return record
