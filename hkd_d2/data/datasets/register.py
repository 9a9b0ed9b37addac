"""Registration of data sets in Detectron2's catalogs."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from .citypersons import SPLITS, load_citypersons
from .coco import load_coco

_LOADERS = {"citypersons": load_citypersons, "coco": load_coco}


def register_datasets(cfg) -> None:
    """Register the data sets of ``cfg.HKD.DATA.REGISTER``; an entry may be registered again.

    Raises:
        ValueError: an entry of another form, an unknown format, or a name that is already taken by
            another data set.
    """
    for entry in cfg.HKD.DATA.REGISTER:
        if not isinstance(entry, (list, tuple)) or [type(v) for v in entry] != [str] * 4:
            raise ValueError(
                f"HKD.DATA.REGISTER: an entry is [name, 'citypersons', root, split] or "
                f"[name, 'coco', annotation file, image root], not {entry}."
            )
        register_dataset(*entry)


def register_builtin_datasets() -> None:
    """Register citypersons_train and citypersons_val under ``$DETECTRON2_DATASETS/citypersons``."""
    root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "citypersons")
    for split in SPLITS:
        register_dataset(f"citypersons_{split}", "citypersons", root, split)


def register_dataset(name: str, form: str, source: str, part: str) -> None:
    """Register one data set; relative paths are relative to the working directory of this call.

    Args:
        name: name for DATASETS.TRAIN and DATASETS.TEST.
        form: "citypersons" or "coco".
        source: root folder (citypersons) or annotation file (coco).
        part: split (citypersons) or image folder (coco).

    Raises:
        ValueError: an unknown form, or a name that is already taken by another data set.
    """
    if form not in _LOADERS:
        raise ValueError(
            f"HKD.DATA.REGISTER: data set '{name}' has the unknown format '{form}'; known are "
            f"{', '.join(_LOADERS)}."
        )
    source = _absolute(source)
    if form == "coco":
        part = _absolute(part)
    entry = (form, source, part)
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name).get("hkd_entry")
        if known != entry:
            raise ValueError(
                f"HKD.DATA.REGISTER: the name '{name}' already stands for "
                f"{known or 'another data set'}, not for {entry}; choose another name."
            )
        return
    metadata = MetadataCatalog.get(name).set(evaluator_type="pedestrian", hkd_entry=entry)
    if form == "citypersons":
        metadata.set(thing_classes=["pedestrian"])
        DatasetCatalog.register(name, lambda: load_citypersons(source, part))
    else:
        metadata.set(json_file=source, image_root=part)
        DatasetCatalog.register(name, lambda: load_coco(source, part, name))


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


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
