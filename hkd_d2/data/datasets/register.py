"""Registration of data sets in Detectron2's catalogs."""

import gc
import importlib
import itertools
import os
import pkgutil

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from hkd_d2.data.datasets.coco import load_coco
from hkd_d2.data.datasets.formats import FOLDERS

__all__ = [
    "FOLDERS",
    "check_records",
    "register_builtin_datasets",
    "register_dataset",
    "register_datasets",
    "register_unnamed",
]

MAX_NAME = 200  # bytes; file systems take names of 255, and results add to them
_PACKAGE = __name__.rpartition(".")[0]

# Every loader of the package enters its format on import.
for _module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
    importlib.import_module(f"{_PACKAGE}.{_module.name}")


def register_datasets(cfg: CfgNode) -> None:
    """Register the data sets of ``cfg.HKD.DATA.REGISTER``; an entry may be registered again.

    Raises:
        ValueError: an entry of another form, an unknown format, or a name that is already taken by
            another data set.
    """
    register_builtin_datasets()  # of formats that HKD.IMPORTS brought
    for entry in cfg.HKD.DATA.REGISTER:
        if not isinstance(entry, (list, tuple)) or [type(v) for v in entry] != [str] * 4:
            raise ValueError(
                f"HKD.DATA.REGISTER: an entry is [name, 'coco', annotation file, image root] or "
                f"[name, format, root, split] with a format out of {', '.join(sorted(FOLDERS))}, "
                f"not {entry}."
            )
        register_dataset(*entry)


def register_builtin_datasets() -> None:
    """Register ``<format>_<split>`` under ``$DETECTRON2_DATASETS/<format>``, as citypersons_val."""
    datasets = os.getenv("DETECTRON2_DATASETS", "datasets")
    for form, (splits, _) in FOLDERS.items():
        for split in splits:
            if f"{form}_{split}" not in DatasetCatalog:
                register_dataset(f"{form}_{split}", form, os.path.join(datasets, form), split)


def register_dataset(name: str, form: str, source: str, part: str) -> None:
    """Register one data set; relative paths are relative to the working directory of this call.

    Args:
        name: name for DATASETS.TRAIN and DATASETS.TEST.
        form: "coco" or a key of :data:`FOLDERS`.
        source: annotation file (coco) or root folder (the others).
        part: image folder (coco) or split (the others).

    Raises:
        ValueError: an unknown form, or a name that no file can have or that is already taken by
            another data set.
    """
    _check_name(name)
    if form not in ("coco", *FOLDERS):
        raise ValueError(
            f"HKD.DATA.REGISTER: data set '{name}' has the unknown format '{form}'; known are "
            f"coco, {', '.join(sorted(FOLDERS))}."
        )
    _, source, part = entry = _entry(form, source, part)
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name).get("hkd_entry")
        if known != entry:
            raise ValueError(
                f"HKD.DATA.REGISTER: the name '{name}' already stands for "
                f"{known or 'another data set'}, not for {entry}; choose another name."
            )
        return
    metadata = MetadataCatalog.get(name).set(evaluator_type="pedestrian", hkd_entry=entry)
    if form == "coco":
        metadata.set(json_file=source, image_root=part)
        DatasetCatalog.register(name, lambda: _load(load_coco, source, part, name))
    else:
        load = FOLDERS[form][1]
        metadata.set(thing_classes=["pedestrian"])
        DatasetCatalog.register(name, lambda: _load(load, source, part))


def register_unnamed(form: str, source: str, part: str) -> str:
    """Register a data set of the command line, which has no name; arguments and errors as of
    :func:`register_dataset`.

    Returns:
        The name made for it, good for a file: the format and the ends of source and part.
    """
    ends = [os.path.basename(text.rstrip("/\\")) for text in (source, part)]
    text = "_".join(filter(None, [form, *ends]))[:50]
    name = stem = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in text)
    for number in itertools.count(2):
        known = MetadataCatalog.get(name).get("hkd_entry") if name in DatasetCatalog else None
        if name not in DatasetCatalog or known == _entry(form, source, part):
            break
        name = f"{stem}-{number}"
    register_dataset(name, form, source, part)
    return name


def check_records(name: str) -> list[dict]:
    """Load the registered data set ``name``.

    Returns:
        list[dict]: its records.

    Raises:
        ValueError: ``name`` is not registered or has no image.
    """
    if name not in DatasetCatalog:
        raise ValueError(
            f"DATASETS: '{name}' is not registered; add it to HKD.DATA.REGISTER or choose a known "
            "name."
        )
    records = DatasetCatalog.get(name)
    if not records:
        raise ValueError(f"DATASETS: '{name}' has no images.")
    return records


def _load(load, *args) -> list[dict]:
    """``load(*args)`` without the garbage collector.

    It would look again and again at all the rows there are, none of which is garbage: of 435,000
    rows the collector takes two thirds of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return load(*args)
    finally:
        if enabled:
            gc.enable()


def _entry(form: str, source: str, part: str) -> tuple[str, str, str]:
    return form, _absolute(source), _absolute(part) if form == "coco" else part


def _check_name(name: str) -> None:
    """Results are written to detections_<name>.json, so a name has to be good for a file."""
    if not name or any(c in "/\\" or not c.isprintable() for c in name if not _escaped(c)):
        raise ValueError(
            f"HKD.DATA.REGISTER: {name!r} cannot name a data set, whose results are written to "
            "detections_<name>.json; choose a name without slashes and control characters."
        )
    if len(os.fsencode(name)) > MAX_NAME:
        raise ValueError(
            f"HKD.DATA.REGISTER: the name '{name[:40]}...' is longer than {MAX_NAME} bytes; choose "
            "a shorter one."
        )


def _escaped(sign: str) -> bool:
    """A byte that is not UTF-8, as Python keeps it in file names."""
    return "\udc80" <= sign <= "\udcff"


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
