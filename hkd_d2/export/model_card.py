"""The card that goes with an exported detector: what it is, where from, and what it is not for."""

import json
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from hkd_d2.files import write_text

NOT_STATED = "Not stated. Ask whoever gave you the file before you pass it on."
LIMITS = """\
- Boxes of upright pedestrians; no masks, no poses, no tracks, and nothing that tells one person
  from another.
- It knows what its training data shows. Other cameras, heights, weather, night and other countries
  were not measured unless a table above says so.
- Small and heavily occluded pedestrians are missed most: see the setups under Metrics.
- A score is not a probability. Choose a threshold on images of your own.
- Distillation does not make a detector fair or safe. Measure both where it matters; do not let this
  file alone decide over anyone's safety."""


def write_model_card(
    path: Path,
    cfg: CfgNode,
    model: nn.Module,
    metadata: dict,
    files: list[dict],
    *,
    title: str,
    run: Path,
    licence: str | None = None,
    notes: str | None = None,
) -> None:
    """Write the card of a detector.

    Args:
        path: Markdown file.
        cfg: the config that it was trained with.
        model: the detector.
        metadata: see :class:`hkd_d2.inference.Detector`.
        files: of each exported file ``file``, ``bytes``, ``sha256``, ``input`` and, if
            it was verified, ``verified`` (the result of
            :func:`hkd_d2.export.verification.verify`) and ``frames`` (what it was verified on).
        title: of the card, for instance the name of its folder.
        run: folder of the training run, whose ``metrics.json`` is read if it is there.
        licence: of the weights.
        notes: a paragraph of the author's.
    """
    distilled = cfg.MODEL.META_ARCHITECTURE == "HKDDetector"
    parts = [
        f"# {title or 'Detector'}: model card",
        _overview(model, metadata),
        notes or "",
        "## Files\n\n" + _files(files),
        "## Data\n\n" + _data(cfg),
        "## Recipe\n\n" + _recipe(cfg, distilled),
        "## Teacher\n\n" + (_teacher(cfg) if distilled else "None: trained without distillation."),
        "## Metrics\n\n" + _metrics(run),
        "## Limits\n\n" + LIMITS,
        "## Licence\n\n"
        f"Weights: {licence or NOT_STATED}\n\n"
        "The training data has terms of its own, which may bind the weights. The software that "
        "trained and exported them, hkd_d2, is under Apache 2.0.",
    ]
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")


def add_section(path: Path, title: str, text: str) -> None:
    """Write a section at the end of a card, in place of an earlier one of that title.

    Args:
        path: the card; nothing is done where there is none.
        title: of the section.
        text: Markdown.
    """
    if path.is_file():
        card = path.read_text(encoding="utf-8").partition(f"\n## {title}\n")[0].rstrip()
        write_text(path, f"{card}\n\n## {title}\n\n{text}\n")


def _overview(model, metadata):
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    sizes = "as they are"
    if metadata["min_size"]:
        sizes = f"shorter side {metadata['min_size']}, longer at most {metadata['max_size']} pixels"
    rows = [
        ("detector", f"{metadata['architecture']}, {metadata['kind']}"),
        ("parameters", f"{parameters:.2f} M"),
        ("classes", ", ".join(metadata["class_names"])),
        ("images", f"{metadata['input_format']}, {sizes}"),
        ("mean, standard deviation", f"{metadata['pixel_mean']}, {metadata['pixel_std']}"),
        ("score threshold", metadata["score_threshold"]),
        ("IoU of suppression", metadata["nms_threshold"]),
        ("most detections", metadata["max_detections"]),
        ("SHA-256 of the weights", f"`{metadata['weights_sha256']}`"),
        ("hkd_d2", metadata["version"]),
    ]
    return _table(("", ""), rows)


def _files(files):
    rows = []
    for file in files:
        verified = "not compared"
        if file.get("verified"):
            v = file["verified"]
            verified = (
                f"{v['detections']} detections on {v['images']} images ({file['frames']}): boxes "
                f"within {v['box']:.4f} px, scores within {v['score']:.1e}"
            )
        size = f"{file['bytes'] / 1e6:.2f} MB"
        rows.append((f"`{file['file']}`", size, file["input"], verified, f"`{file['sha256']}`"))
    return _table(("file", "size", "images", "against PyTorch", "SHA-256"), rows)


def _data(cfg):
    training = ", ".join(cfg.DATASETS.TRAIN) or "not stated"
    share = cfg.HKD.DATA.LABELED_SHARE
    used = f"{share:.0%} of the labels" if share < 1 else "all labels"
    hidden = ""
    if cfg.HKD.DATA.MIN_VISIBILITY > 0:
        hidden = f" or visible by less than {cfg.HKD.DATA.MIN_VISIBILITY:.0%}"
    lines = [
        f"- Training: {training}, {used}. Ignored: pedestrians under {cfg.HKD.DATA.MIN_HEIGHT} "
        f"pixels{hidden}.",
        f"- Test: {', '.join(cfg.DATASETS.TEST) or 'not stated'}.",
    ]
    if cfg.HKD.DATA.PSEUDO:
        pools = ", ".join(Path(p).name for p in cfg.HKD.DATA.PSEUDO)
        lines.append(
            f"- Pseudo-labels: {pools}, {cfg.HKD.DATA.PSEUDO_RATIO:g} images for each labelled one."
        )
    return "\n".join(lines)


def _recipe(cfg, distilled):
    lines = [
        f"- {cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images, "
        f"{cfg.HKD.SOLVER.OPTIMIZER}, learning rate {cfg.SOLVER.BASE_LR:g} "
        f"({cfg.SOLVER.LR_SCHEDULER_NAME}), weight decay {cfg.SOLVER.WEIGHT_DECAY:g}.",
        f"- Seed: {cfg.SEED if cfg.SEED >= 0 else 'none'}.",
    ]
    if distilled:
        terms = ", ".join(f"{n} (weight {cfg.HKD[n.upper()].WEIGHT:g})" for n in cfg.HKD.TERMS)
        lines.append(f"- Distilled with the terms {terms or 'none'}.")
    return "\n".join(lines)


def _teacher(cfg):
    node = cfg.HKD.TEACHER
    weights = "/".join(Path(node.WEIGHTS).parts[-2:])
    return f"Config `{node.CONFIG_FILE}`, weights `{weights}`, run in {node.PRECISION}."


def _metrics(run):
    """The last evaluation in Detectron2's ``metrics.json``, one JSON object a line."""
    scores, iteration = {}, None
    if (run / "metrics.json").is_file():
        for line in (run / "metrics.json").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found = {k: v for k, v in record.items() if k.startswith(("miss_rate/", "bbox/"))}
            if found:
                scores, iteration = found, record.get("iteration")
    if not scores:
        return "Not measured: no evaluation stands beside the weights."
    rows = [
        (f"MR^-2 {k.split('/')[1]}" if k.startswith("miss_rate/") else k.split("/")[1], f"{v:.2f}")
        for k, v in sorted(scores.items(), reverse=True)
    ]
    return (
        f"Of the detector in PyTorch after {iteration} iterations, on the test set above, in "
        "percent. MR^-2: lower is better; AP: higher.\n\n" + _table(("setup", "value"), rows)
    )


def _table(header, rows):
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)
