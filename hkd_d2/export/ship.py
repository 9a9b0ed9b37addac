"""From weights to a folder that can be given away: export, verify, write the card."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode

from hkd_d2.data.datasets.synthetic import draw_street
from hkd_d2.data.image_files import find_images
from hkd_d2.data.pseudo_labels import file_sha256
from hkd_d2.export.formats import SUFFIXES, Shape, export
from hkd_d2.export.model_card import write_model_card
from hkd_d2.export.verification import verify
from hkd_d2.export.weights import save_safetensors
from hkd_d2.inference import load_detector, read_image
from hkd_d2.inference.images import resized_shape
from hkd_d2.inference.torch_backend import TorchDetector, build_detector, load_config

logger = logging.getLogger(__name__)

FORMS = (*SUFFIXES, "safetensors")
# Real frames to verify on, beside a checkout of this repository; docs/data.md says what they are.
FRAMES = Path(__file__).parents[3] / "shared" / "data" / "mot17mini" / "images"
NUM_IMAGES = 6


def ship(
    weights: str | Path,
    config_file: str | Path | None,
    out: Path,
    forms: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    class_names: Sequence[str] | None = None,
    images: str | Path | None = None,
    licence: str | None = None,
    notes: str | None = None,
) -> list[dict]:
    """Export a detector and write it only if it equals Detectron2's on images.

    Args:
        weights, config_file, score_threshold, nms_threshold, class_names: see
            :func:`hkd_d2.load_detector`.
        out (Path): folder to write; files of the same names are replaced.
        forms (sequence of str): any of :data:`FORMS`.
        size (tuple[int, int] or None): height and width that images have after resizing; those of
            other proportions are filled up. None for any, by the config's rule.
        batch (int or None): number of images of a call; None for any.
        images (str or None): folder of images to verify on; None for MOT17's frames, if they are
            there, or generated streets.
        licence, notes: see :func:`write_model_card`.

    Returns:
        list[dict]: of each file ``file``, ``path``, ``bytes``, ``sha256``, ``input``, ``verified``
            and ``frames``.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`hkd_d2.load_detector`; an unknown
            form; a detector that cannot be exported; a file that finds other detections.
    """
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise ValueError(f"The format is '{unknown}'; choose from {', '.join(FORMS)}.")
    if batch is not None and batch < 1:
        raise ValueError(f"The batch is {batch}; give 1 or more.")
    if size is not None and min(size) < 1:
        raise ValueError(f"The size is {size[0]}x{size[1]}; give a height and width in pixels.")
    model, metadata = build_detector(
        weights,
        config_file,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        class_names=class_names,
    )
    cfg = load_config(weights, config_file)
    if size is not None:
        metadata |= {"min_size": min(size), "max_size": max(size)}
    out.mkdir(parents=True, exist_ok=True)
    config = out / "config.yaml"
    config.write_text(shipped_config(cfg, metadata).dump(), encoding="utf-8")
    frames, name = verification_images(metadata, size, images)
    reference = TorchDetector(model, metadata, batch or NUM_IMAGES)
    files = []
    for form in forms:
        path = out / f"model{SUFFIXES.get(form, '.safetensors')}"
        part = path.with_name(f"part-{path.name}")
        try:
            if form == "safetensors":
                save_safetensors(model, metadata, part)
                takes = "with config.yaml: any"
            else:
                export(model, metadata, part, form, Shape(size, batch))
                takes = f"{batch or 'any number'} of {'x'.join(map(str, size or ['any size']))}"
            backend = "onnx" if form == "onnx" else "torch"
            exported = load_detector(
                part, backend, config_file=config, batch_size=reference.batch_size
            )
            verified = verify(reference, exported, frames)
        except Exception:
            part.unlink(missing_ok=True)
            raise
        os.replace(part, path)
        files.append(
            {
                "file": path.name,
                "path": str(path),
                "bytes": path.stat().st_size,
                "sha256": file_sha256(str(path)),
                "input": takes,
                "verified": verified,
                "frames": name,
            }
        )
        logger.info("Wrote %s", path)
    write_model_card(
        out / "model_card.md",
        cfg,
        model,
        metadata,
        files,
        run=Path(weights).parent,
        licence=licence,
        notes=notes,
    )
    return files


def shipped_config(cfg: CfgNode, metadata: dict) -> CfgNode:
    """The config of the plain student: no teacher, no terms, no paths of where it was trained."""
    cfg = cfg.clone()
    if cfg.MODEL.META_ARCHITECTURE == "HKDDetector":
        cfg.MODEL.META_ARCHITECTURE = cfg.HKD.STUDENT.META_ARCHITECTURE
    for key in ("CONFIG_FILE", "WEIGHTS"):
        cfg.HKD.TEACHER[key] = ""
    cfg.HKD.TERMS, cfg.HKD.DATA.PSEUDO = [], []
    # What the classes are called is read off the data sets' formats.
    cfg.HKD.DATA.REGISTER = [
        [name, form, *(Path(v).name for v in where)] for name, form, *where in cfg.HKD.DATA.REGISTER
    ]
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.MODEL.DEVICE = "", "output/shipped", "cpu"
    cfg.HKD.BACKBONE.PRETRAINED = False
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = metadata["min_size"], metadata["max_size"]
    for head in (cfg.MODEL.RETINANET, cfg.MODEL.ROI_HEADS):  # FCOS reads the former
        head.SCORE_THRESH_TEST = metadata["score_threshold"]
        head.NMS_THRESH_TEST = metadata["nms_threshold"]
    return cfg


def verification_images(
    metadata: dict, size: tuple[int, int] | None, folder: str | Path | None
) -> tuple[list, str]:
    """At most :data:`NUM_IMAGES` images that a detector takes, and what they are.

    Raises:
        FileNotFoundError: no image in ``folder``.
        ValueError: no image in ``folder`` that has the proportions of ``size``.
    """
    if folder is None and FRAMES.is_dir():
        found, name = _fitting(FRAMES, metadata, size), "frames of MOT17"
        if found:
            return found, name
    if folder is not None:
        found = _fitting(Path(folder), metadata, size)
        if not found:
            raise ValueError(
                f"No image in '{folder}' has the proportions of {size[0]}x{size[1]}; give others "
                "with --images."
            )
        return found, "images given"
    height, width = size or resized_shape(384, 640, metadata["min_size"], metadata["max_size"])
    streets = [draw_street(index=i, height=height, width=width)[0] for i in range(NUM_IMAGES)]
    return [np.ascontiguousarray(street[:, :, ::-1]) for street in streets], "generated streets"


def _fitting(folder, metadata, size):
    """Images spread over a folder; where the size is fixed those that are resized to it."""
    records = find_images(str(folder))
    if size is not None:
        rule = metadata["min_size"], metadata["max_size"]
        records = [r for r in records if resized_shape(r["height"], r["width"], *rule) == size]
    step = max(len(records) // NUM_IMAGES, 1)
    return [read_image(r["file_name"]) for r in records[::step][:NUM_IMAGES]]
