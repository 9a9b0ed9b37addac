"""From weights to a folder that can be given away: export, verify, write the card."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from torch import nn

from hkd_d2.config import student_config
from hkd_d2.data.image_files import find_images
from hkd_d2.data.images import resized_shape
from hkd_d2.data.pseudo_labels import file_sha256
from hkd_d2.data.streets import draw_street
from hkd_d2.distillation import TERM_REGISTRY
from hkd_d2.export.formats import SUFFIXES, Shape, export
from hkd_d2.export.model_card import write_model_card
from hkd_d2.export.verification import verify
from hkd_d2.export.weights import save_safetensors
from hkd_d2.files import files_beside
from hkd_d2.inference import load_detector, read_image
from hkd_d2.inference.torch_backend import TorchDetector, build_detector, load_config

logger = logging.getLogger(__name__)

FORMS = (*SUFFIXES, "safetensors")
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
        out: folder to write; files of the same names are replaced when all new ones are
            verified, and none before.
        forms: any of :data:`FORMS`.
        size: height and width that images have after resizing; those of
            other proportions are filled up. None for any, by the config's rule.
        batch: number of images of a call; None for any.
        images: folder of images to verify on; None for drawn streets.
        licence, notes: see :func:`write_model_card`.

    Returns:
        list[dict]: of each file ``file``, ``path``, ``bytes``, ``sha256``, ``input``, ``verified``
            and ``frames``.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`hkd_d2.load_detector`; an unknown
            form; a detector that cannot be exported; a file that finds other detections; a run's
            own folder as ``out``.
    """
    _check(forms, size, batch)
    source, target = Path(config_file or Path(weights).parent / "config.yaml"), out / "config.yaml"
    if source.exists() and target.exists() and source.samefile(target):
        raise ValueError(
            f"'{out}' is the folder that is exported, whose config.yaml would be replaced; name "
            "another one with --out."
        )
    cfg = load_config(weights, config_file)
    model, metadata = build_detector(
        weights,
        config_file,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        class_names=class_names,
    )
    if size is not None:
        metadata |= {"min_size": min(size), "max_size": max(size)}
    frames, name = verification_images(metadata, size, images)
    reference = TorchDetector(model, metadata, batch or NUM_IMAGES)
    files = []
    with files_beside(out) as folder:
        shipped = shipped_config(cfg, metadata)
        (folder / "config.yaml").write_text(shipped.dump(), encoding="utf-8")
        for form in forms:
            path = write_form(form, model, metadata, folder, Shape(size, batch))
            try:
                verified = verify(reference, _reload(path, reference.batch_size), frames)
            except ValueError as error:
                raise ValueError(f"'{weights}' as {form}: {error}") from error
            files.append(
                {
                    "file": path.name,
                    "path": str(out / path.name),
                    "bytes": path.stat().st_size,
                    "sha256": file_sha256(str(path)),
                    "input": _takes(form, size, batch),
                    "verified": verified,
                    "frames": name,
                }
            )
        write_model_card(
            folder / "model_card.md",
            cfg,
            model,
            metadata,
            files,
            title=out.resolve().name,
            run=Path(weights).parent,
            licence=licence,
            notes=notes,
        )
    for file in files:
        logger.info("Wrote %s", file["path"])
    return files


def _check(forms, size, batch):
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise ValueError(f"The format is '{unknown}'; choose from {', '.join(FORMS)}.")
    if batch is not None and batch < 1:
        raise ValueError(f"The batch is {batch}; give 1 or more.")
    if size is not None and min(size) < 1:
        raise ValueError(f"The size is {size[0]}x{size[1]}; give a height and width in pixels.")


def write_form(form: str, model: nn.Module, metadata: dict, folder: Path, shape: Shape) -> Path:
    """Write ``model`` in one of :data:`FORMS` into ``folder`` and return the file's path."""
    path = folder / f"model{SUFFIXES.get(form, '.safetensors')}"
    if form == "safetensors":
        save_safetensors(model, metadata, path)
    else:
        export(model, metadata, path, form, shape)
    return path


def _reload(path, batch_size):
    """Load a written file as its users would."""
    backend = "onnx" if path.suffix == SUFFIXES["onnx"] else "torch"
    return load_detector(path, backend, batch_size=batch_size)


def _takes(form, size, batch):
    if form == "safetensors":
        return "with config.yaml: any"
    return f"{batch or 'any number'} of {'x'.join(map(str, size or ['any size']))}"


def shipped_config(cfg: CfgNode, metadata: dict) -> CfgNode:
    """The config of the plain student: no teacher, no terms, no paths of where it was trained."""
    cfg = student_config(cfg)
    for key in ("CONFIG_FILE", "WEIGHTS"):
        cfg.HKD.TEACHER[key] = ""
    cfg.HKD.IMPORTS, cfg.HKD.TERMS, cfg.HKD.DATA.PSEUDO = [], [], []
    # Only a process that imported such a term would know its keys.
    for name, term in TERM_REGISTRY:
        if not term.__module__.startswith("hkd_d2."):
            cfg.HKD.pop(name.upper(), None)
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
    return [np.ascontiguousarray(street[:, :, ::-1]) for street in streets], "drawn streets"


def _fitting(folder, metadata, size):
    """Images spread over a folder; where the size is fixed those that are resized to it."""
    records = find_images(str(folder))
    if size is not None:
        records = [r for r in records if _seen_at(r, metadata) == size]
    step = max(len(records) // NUM_IMAGES, 1)
    chosen = records[::step][:NUM_IMAGES]
    for record in chosen:
        _seen_at(record, metadata)
    return [read_image(record["file_name"]) for record in chosen]


def _seen_at(record, metadata):
    """Height and width after resizing; the error of an image too narrow for it names the file."""
    rule = metadata["min_size"], metadata["max_size"]
    try:
        return resized_shape(record["height"], record["width"], *rule)
    except ValueError as error:
        raise ValueError(f"The image '{record['file_name']}' cannot be used: {error}") from error
