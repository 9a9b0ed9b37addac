"""Do the anchors fit the boxes? What no anchor meets is hardly learned."""

import logging
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from torch import nn

from hkd_d2.data.mapper import is_ignored

logger = logging.getLogger(__name__)

MIN_OVERLAP = 0.5  # intersection over union
MUCH = 0.1  # a larger share of boxes without an anchor is a warning


@dataclass(frozen=True)
class AnchorFit:
    """Fit of the anchors to the boxes that count in training.

    Attributes:
        boxes: number of boxes, each at every size that training gives its image.
        unmet: share of them that no anchor overlaps by :data:`MIN_OVERLAP`, wherever it lies.
        box_heights: of the lowest and the highest box, resized pixels.
        anchor_heights: of the lowest and the highest anchor, resized pixels.
        lowest_met: height of the lowest box that an anchor meets, pixels of the original image;
            None where none is met.
    """

    boxes: int
    unmet: float
    box_heights: tuple[float, float]
    anchor_heights: tuple[float, float]
    lowest_met: float | None


def anchor_sizes(detector: nn.Module) -> torch.Tensor | None:
    """Width and height of a detector's anchors, float32 (A, 2) pixels; None where it has none.

    FCOS has points in place of anchors: what it takes for one stands for the stride alone.
    """
    owner = getattr(detector, "proposal_generator", None) or detector
    cells = getattr(getattr(owner, "anchor_generator", None), "cell_anchors", None)
    if cells is None or "FCOS" in type(detector).__name__:
        return None
    boxes = torch.cat([cell.detach().float().cpu() for cell in cells])
    return boxes[:, 2:] - boxes[:, :2]


def best_overlap(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Largest intersection over union of each box with an anchor on the same centre.

    Args:
        boxes: (N, 2) float32, width and height.
        anchors: (A, 2) float32, likewise.

    Returns:
        (N,) float32. Anchors stand on a grid, so the overlap in an image is at most this.
    """
    common = torch.minimum(boxes[:, None], anchors).prod(-1)
    union = boxes.prod(-1)[:, None] + anchors.prod(-1) - common
    return (common / union.clamp(min=1e-9)).max(1).values


def resize_factors(cfg: CfgNode, height: int, width: int) -> list[float]:
    """Factors by which training resizes an image; the ends and the middle of a range of sizes."""
    sizes = [cfg.INPUT.MIN_SIZE_TRAIN] if isinstance(cfg.INPUT.MIN_SIZE_TRAIN, int) else None
    sizes = sizes or list(cfg.INPUT.MIN_SIZE_TRAIN)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        sizes = [min(sizes), (min(sizes) + max(sizes)) / 2, max(sizes)]
    longest = cfg.INPUT.MAX_SIZE_TRAIN / max(height, width)
    return [min(size / min(height, width), longest) if size else 1.0 for size in sizes]


def anchor_fit(cfg: CfgNode, anchors: torch.Tensor, records: list[dict]) -> AnchorFit | None:
    """Compare the boxes that count, as training resizes them, with the anchors.

    Args:
        cfg: INPUT and HKD.DATA.
        anchors: of :func:`anchor_sizes`.
        records: of a data set.

    Returns:
        None where no box counts.
    """
    sizes, original = [], []
    for record in records:
        boxes = [
            BoxMode.convert(row["bbox"], row["bbox_mode"], BoxMode.XYWH_ABS)[2:]
            for row in record["annotations"]
            if not is_ignored(row, cfg.HKD.DATA.MIN_HEIGHT, cfg.HKD.DATA.MIN_VISIBILITY)
        ]
        for factor in resize_factors(cfg, record["height"], record["width"]) if boxes else ():
            sizes += [(w * factor, h * factor) for w, h in boxes]
            original += [h for _, h in boxes]
    if not sizes:
        return None
    sizes = torch.tensor(sizes, dtype=torch.float32)
    met = torch.cat([best_overlap(part, anchors) for part in sizes.split(100_000)]) >= MIN_OVERLAP
    heights = torch.tensor(original)[met]
    return AnchorFit(
        boxes=len(sizes),
        unmet=1 - met.float().mean().item(),
        box_heights=(sizes[:, 1].min().item(), sizes[:, 1].max().item()),
        anchor_heights=(anchors[:, 1].min().item(), anchors[:, 1].max().item()),
        lowest_met=heights.min().item() if len(heights) else None,
    )


def report_anchors(cfg: CfgNode, detector: nn.Module, datasets: dict[str, list[dict]]) -> None:
    """Log for each training set which share of its boxes no anchor meets; much is a warning."""
    anchors = anchor_sizes(detector)
    if anchors is None:
        return
    for name, records in datasets.items():
        fit = anchor_fit(cfg, anchors, records)
        if fit is None:
            continue
        low, high = fit.box_heights
        text = (
            f"Anchors: {100 * fit.unmet:.1f} % of the boxes of '{name}' that count overlap none by "
            f"{MIN_OVERLAP}. After resizing boxes are {low:.0f} to {high:.0f} pixels high, anchors "
            f"{fit.anchor_heights[0]:.0f} to {fit.anchor_heights[1]:.0f}"
        )
        if fit.unmet <= MUCH:
            logger.info("%s.", text)
            continue
        lowest = (
            f" (the lowest box that is met has {fit.lowest_met:.0f} pixels)"
            if fit.lowest_met is not None
            else ""
        )
        logger.warning(
            "%s%s; change MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS, INPUT.MIN_SIZE_TRAIN or "
            "HKD.DATA.MIN_HEIGHT.",
            text,
            lowest,
        )
