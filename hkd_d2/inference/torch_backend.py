"""A detector from its weights and config, run by Detectron2."""

import hkd_d2._requirements  # noqa: F401  isort: skip

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from hkd_d2 import __version__
from hkd_d2.config import load_config as load_named_config
from hkd_d2.config import load_mentioned_config, student_config
from hkd_d2.configuration.merge import merge_options
from hkd_d2.devices import check_device
from hkd_d2.inference.detector import Detector, check_thresholds
from hkd_d2.modeling.build import build_from_config
from hkd_d2.modeling.checkpoint import StudentCheckpointer, weights_sha256
from hkd_d2.modeling.families import check_detector


class TorchDetector(Detector):
    """Runs a Detectron2 detector in eval mode.

    Args:
        model: GeneralizedRCNN, RetinaNet or FCOS, in eval mode.
        metadata: see :class:`Detector`.
        batch_size: most images that run at once.
    """

    def __init__(self, model: nn.Module, metadata: dict, batch_size: int = 8):
        super().__init__(metadata, batch_size)
        self.model = model

    def _run(self, batch):
        records = [{"image": torch.from_numpy(np.ascontiguousarray(image))} for image in batch]
        with torch.inference_mode():
            outputs = self.model(records)
        found = []
        for output in outputs:
            instances = output["instances"].to("cpu")
            found.append(
                (
                    instances.pred_boxes.tensor.numpy(),
                    instances.scores.numpy(),
                    instances.pred_classes.numpy(),
                )
            )
        return found


def build_detector(
    weights: str | Path,
    config_file: str | Path | None = None,
    *,
    device: str = "cpu",
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[nn.Module, dict]:
    """Build the detector of a config, without its teacher, and fill it from ``weights``.

    Returns:
        nn.Module: in eval mode, without gradients.
        dict: its metadata, see :class:`Detector`.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_detector`.
    """
    check_thresholds(score_threshold=score_threshold, nms_threshold=nms_threshold)
    cfg = student_config(load_config(weights, config_file))
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}'; only RGB and BGR are served.")
    check_device(device, "The device")
    cfg.MODEL.DEVICE = device
    # No ImageNet weights are fetched for a detector whose weights are given.
    cfg.MODEL.WEIGHTS, cfg.HKD.BACKBONE.PRETRAINED = str(weights), False
    for head in (cfg.MODEL.RETINANET, cfg.MODEL.ROI_HEADS):  # FCOS reads the former
        if score_threshold is not None:
            head.SCORE_THRESH_TEST = float(score_threshold)
        if nms_threshold is not None:
            head.NMS_THRESH_TEST = float(nms_threshold)
    owner = config_file or Path(weights).parent / "config.yaml"
    model = build_from_config(cfg, f"'{owner}'").eval().requires_grad_(False)
    check_detector(model, "detector")
    StudentCheckpointer(model).load_complete(str(weights), str(owner))
    return model, describe(cfg, model, class_names)


def load_config(
    weights: str | Path, config_file: str | Path | None, options: Sequence[str] = ()
) -> CfgNode:
    """Read the config of a detector.

    Args:
        weights: its checkpoint.
        config_file: its config; None for the config.yaml beside the weights.
        options: keys and values by turns, applied last.

    Modules under ``HKD.IMPORTS`` are imported for a ``config_file`` that is named, and refused in
    the file that lies beside the weights.

    Raises:
        FileNotFoundError: no such file, or none beside the weights.
        ValueError: a file that is no config of Detectron2 and this project.
    """
    if config_file:
        return load_named_config(config_file, options)
    path = Path(weights).parent / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"The config '{path}' does not exist; give config_file, the config with which "
            f"'{weights}' was trained."
        )
    load_named_config(None, options)  # imports the modules that the options name
    cfg = load_mentioned_config(path)
    merge_options(cfg, options)
    return cfg


def describe(cfg: CfgNode, model: nn.Module, class_names: Sequence[str] | None = None) -> dict:
    """Metadata of a detector: what one has to know to run it, see :class:`Detector`.

    Raises:
        ValueError: another number of names than the detector has classes.
    """
    two_stage = hasattr(model, "roi_heads")
    head = cfg.MODEL.ROI_HEADS if two_stage else cfg.MODEL.RETINANET
    number = head.NUM_CLASSES
    names = list(class_names) if class_names is not None else _names_of_training_set(cfg, number)
    if len(names) != number:
        raise ValueError(
            f"The detector has {number} classes and {len(names)} are named ({', '.join(names)})."
        )
    return {
        "class_names": names,
        "kind": "two-stage" if two_stage else "one-stage",
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "input_format": cfg.INPUT.FORMAT,
        "pixel_mean": [float(v) for v in cfg.MODEL.PIXEL_MEAN],
        "pixel_std": [float(v) for v in cfg.MODEL.PIXEL_STD],
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "size_divisibility": max(model.backbone.size_divisibility, 1),
        "score_threshold": float(head.SCORE_THRESH_TEST),
        "nms_threshold": float(head.NMS_THRESH_TEST),
        "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "version": __version__,
        "weights_sha256": weights_sha256(model),
    }


def _names_of_training_set(cfg, number):
    """Without registering it: other detectors may know another set by the same name."""
    name = next(iter(cfg.DATASETS.TRAIN), "")
    entry = next((e for e in cfg.HKD.DATA.REGISTER if e[0] == name), None)
    if entry is not None and entry[1] != "coco":
        names = ["pedestrian"]  # of every format but COCO's, see data/datasets/register.py
    else:
        names = (name and MetadataCatalog.get(name).get("thing_classes")) or []
    return list(names) if len(names) == number else [f"class_{i}" for i in range(number)]
