"""A teacher labels images: Detectron2's own inference, into a file of pseudo-labels."""

import datetime

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from tqdm import tqdm

from hkd_d2.config import student_config
from hkd_d2.data.datasets import check_records
from hkd_d2.data.mapper import PedestrianMapper
from hkd_d2.data.pseudo_labels import file_sha256, make_pseudo_labels
from hkd_d2.modeling.build import build_from_config
from hkd_d2.modeling.checkpoint import StudentCheckpointer


def label_images(
    cfg: CfgNode,
    weights: str,
    records: list[dict],
    *,
    score_threshold: float,
    classes: list[str] | None = None,
    info: dict | None = None,
) -> dict:
    """Run a detector over images and make a file of its detections.

    Args:
        cfg: the teacher's; of a config that distils, its student.
        weights: the teacher's checkpoint.
        records: images, see :mod:`hkd_d2.data.datasets.records`.
        score_threshold: detections above it are kept; it replaces the config's own.
        classes: the teacher's class list; None for that of its first training set.
        info: further keys of the file's ``info``.

    Returns:
        dict: a file, see :mod:`hkd_d2.data.pseudo_labels`.

    Raises:
        FileNotFoundError: no such weights.
        ValueError: weights of another architecture, a threshold that is none, or a class list that
            is not known or not the detector's.
    """
    if not 0 <= score_threshold < 1:
        raise ValueError(f"The score threshold is {score_threshold}; give a number from 0 to 1.")
    cfg = student_config(cfg)
    cfg.MODEL.WEIGHTS, cfg.HKD.BACKBONE.PRETRAINED = weights, False
    for head in (cfg.MODEL.RETINANET, cfg.MODEL.ROI_HEADS):  # FCOS reads the former
        head.SCORE_THRESH_TEST = score_threshold
    sha256 = file_sha256(weights)
    model = build_from_config(cfg, "the teacher").eval()
    StudentCheckpointer(model).load_complete(weights, "the teacher")
    classes = _class_list(cfg, model, classes)

    loader = build_detection_test_loader(
        records, mapper=PedestrianMapper(cfg, False), num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    detections = []
    with torch.no_grad():
        for batch in tqdm(loader, desc="labelling", unit="image"):
            detections += [output["instances"].to("cpu") for output in model(batch)]
    return make_pseudo_labels(
        records,
        detections,
        classes,
        {
            **(info or {}),
            "teacher_weights": weights,
            "teacher_sha256": sha256,
            "score_threshold": score_threshold,
            "date_created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    )


def _class_list(cfg, model, classes):
    number = model.roi_heads.num_classes if hasattr(model, "roi_heads") else model.num_classes
    if not classes:
        name = next(iter(cfg.DATASETS.TRAIN), None)
        if name not in DatasetCatalog:
            raise ValueError(
                f"The teacher's training set '{name}' is not registered, so the names of its "
                f"{number} classes are not known; give them with --classes."
            )
        # The names of a COCO file are known when it has been read.
        if not MetadataCatalog.get(name).get("thing_classes"):
            check_records(name)
        classes = MetadataCatalog.get(name).thing_classes
    if len(classes) != number:
        raise ValueError(
            f"The teacher has {number} classes and {len(classes)} are named "
            f"({', '.join(classes)}); give their names with --classes."
        )
    return list(classes)
