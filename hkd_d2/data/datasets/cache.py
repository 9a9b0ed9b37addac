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
    name: str, root: str, sources: Iterable[str], parse: Callable[[], list[dict]]
) -> list[dict]:
    """Records from the cache where the sources have not changed, else from ``parse``.

    A cache that is stale or damaged is made anew with one line in the log; one that cannot be
    written is done without.

    Args:
        name: of the data set and split, for the file's name.
        root: folder of the data set; each has a cache of its own.
        sources: every file that ``parse`` reads; all exist.
        parse: returns records (see :mod:`hkd_d2.data.datasets.records`), with XYWH_ABS boxes.
    """
    key = _key(sources)
    root = os.path.abspath(root)
    place = hashlib.sha256(root.encode()).hexdigest()[:12]
    path = os.path.join(cache_folder(), f"{name}-{place}.json")
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as f:
                content = json.load(f)
            if content["key"] == key:
                return [_to_record(record) for record in content["records"]]
            logger.info(f"{path}: the data set or its loader has changed; parsing {root} again.")
        except (OSError, ValueError, TypeError, LookupError) as error:
            logger.warning(f"{path}: the cache is damaged ({error}); parsing {root} again.")
    records = parse()
    try:
        os.makedirs(cache_folder(), exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=cache_folder(), suffix=".tmp", delete=False
        ) as f:
            json.dump({"key": key, "records": records}, f, separators=(",", ":"))
        os.replace(f.name, path)  # whole or not at all
    except OSError as error:
        logger.warning(f"{path}: the cache cannot be written ({error}).")
    return records


def cache_folder() -> str:
    """``$HKD_D2_CACHE``, or ``~/.cache/hkd_d2``."""
    return os.path.expanduser(os.getenv("HKD_D2_CACHE") or os.path.join("~", ".cache", "hkd_d2"))


def _key(sources: Iterable[str]) -> str:
    digest = hashlib.sha256()
    code = glob.glob(os.path.join(glob.escape(os.path.dirname(__file__)), "*.py"))
    for path in (*sorted(code), *sources):
        status = os.stat(path)
        digest.update(f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _to_record(record: dict) -> dict:
    for row in record["annotations"]:
        row["bbox_mode"] = BoxMode(row["bbox_mode"])  # JSON has its number
    return record
