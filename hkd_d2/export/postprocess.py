"""Parts of a detector's inference with shapes that do not depend on what is in the image.

Detectron2 selects boxes by boolean indices, whose number only a run can tell; ``torch.export``
stops there. Here a selection is the K best rows with a mask of those that count, so that every
tensor has a known shape.
"""

from collections.abc import Callable

import torch
import torchvision  # noqa: F401  registers torchvision::nms and torchvision::roi_align
from torch import Tensor, nn
from torch.nn import functional as F

# Stands for minus infinity in the scores of rows that do not count, logits among them.
LOWEST = -3.0e38
# (N, M, 4) boxes, (N, G, M) scores of each group, IoU -> (N, M) bool
KeepByNms = Callable[[Tensor, Tensor, float], Tensor]


def keep_by_nms(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Mask of the boxes that no better one of their image and group overlaps by more.

    All images and groups are suppressed in one call, each moved to a place of its own; in float64,
    since boxes far out would be rounded otherwise.

    Args:
        boxes: (N, M, 4) XYXY.
        scores: (N, G, M), :data:`LOWEST` where a box is not of the group.
        iou: threshold.

    Returns:
        Tensor: (N, M) bool; a box of no group does not stay.
    """
    images, groups, rows = scores.shape
    member = (scores > LOWEST).flatten().nonzero().squeeze(1)
    place, row = member // rows, member // (groups * rows) * rows + member % rows
    boxes = boxes.reshape(-1, 4)[row].double()
    extent = torch.cat([boxes.flatten(), boxes.new_zeros(1)])  # there may be no box
    span = extent.amax() - extent.amin() + 1
    boxes = boxes + (place.double() * span)[:, None]
    kept = torch.ops.torchvision.nms(boxes, scores.flatten()[member].double(), iou)
    mask = torch.zeros(images * rows, dtype=torch.int64, device=boxes.device)
    return mask.index_fill(0, row[kept], 1).reshape(images, rows) > 0


def positive(key: str, number: int) -> int:
    """``number``, which an exported file has as the length of a tensor.

    Raises:
        ValueError: it is not positive.
    """
    if number < 1:
        raise ValueError(f"{key} is {number}, which a file cannot have; set it to 1 or more.")
    return int(number)


def by_group(scores: Tensor, valid: Tensor, groups: Tensor, number: int) -> Tensor:
    """(N, number, M) scores of each group, :data:`LOWEST` elsewhere, of (N, M) scores.

    Args:
        valid: (N, M) bool, rows that count.
        groups: (N, M) int64, level or class of each row.
        number: number of groups.
    """
    every = torch.arange(number, device=scores.device)[None, :, None]
    return torch.where((groups[:, None] == every) & valid[:, None], scores[:, None], LOWEST)


def best(scores: Tensor, valid: Tensor, number: int, *others: Tensor) -> tuple[Tensor, ...]:
    """The ``number`` best rows that count, by falling score, padded where there are fewer.

    Args:
        scores: (N, M).
        valid: (N, M) bool.
        *others (Tensor): (N, M) or (N, M, C), selected alike.

    Returns:
        tuple[Tensor, ...]: scores (N, number), valid, and the others; what is in padded rows is of
            no meaning.
    """
    # Padded first, so that there are enough rows however many are given.
    scores = F.pad(torch.where(valid, scores, LOWEST), (0, number), value=LOWEST)
    scores, rows = scores.topk(number, dim=1)
    selected = []
    for other in others:
        other = F.pad(other, (0, number) if other.dim() == 2 else (0, 0, 0, number))
        index = rows if other.dim() == 2 else rows[..., None].expand(-1, -1, other.shape[2])
        selected.append(other.gather(1, index))
    return scores, scores > LOWEST, *selected


def clip(boxes: Tensor, height, width) -> Tensor:
    """(..., 4) XYXY boxes inside an image."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        [x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], dim=-1
    )


def has_area(boxes: Tensor, smallest: float = 0.0) -> Tensor:
    """Mask of the (..., 4) boxes that are finite with sides longer than ``smallest``."""
    width = boxes[..., 2] - boxes[..., 0]
    height = boxes[..., 3] - boxes[..., 1]
    return (width > smallest) & (height > smallest) & boxes.isfinite().all(-1)


def dense(prediction: Tensor, columns: int) -> Tensor:
    """A level's map (N, A * columns, H, W) as rows in anchor order, (N, H * W * A, columns)."""
    number, channels, height, width = prediction.shape
    prediction = prediction.reshape(number, channels // columns, columns, height, width)
    return prediction.permute(0, 3, 4, 1, 2).reshape(number, -1, columns)


class Anchors(nn.Module):
    """The anchors of Detectron2's ``DefaultAnchorGenerator``, from the shapes of the maps."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.strides, self.offset = list(generator.strides), float(generator.offset)
        self.cells = [cell.clone() for cell in generator.cell_anchors]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """(H * W * A, 4) anchors of each level."""
        anchors = []
        for feature, stride, cells in zip(maps, self.strides, self.cells, strict=True):
            height, width = feature.shape[-2:]
            shifts = [
                (torch.arange(size, device=feature.device, dtype=torch.float32) + self.offset)
                * stride
                for size in (height, width)
            ]
            x = shifts[1][None, :].expand(height, width)
            y = shifts[0][:, None].expand(height, width)
            centres = torch.stack([x, y, x, y], dim=-1)
            anchors.append((centres[:, :, None] + cells.to(feature)).reshape(-1, 4))
        return anchors


class DecodeDeltas(nn.Module):
    """Boxes from (dx, dy, dw, dh) relative to source boxes: Detectron2's ``Box2BoxTransform``."""

    def __init__(self, transform):
        super().__init__()
        self.weights = [float(w) for w in transform.weights]
        self.scale_clamp = float(transform.scale_clamp)

    def forward(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """(..., 4) boxes of (..., 4) deltas and source boxes."""
        size = boxes[..., 2:] - boxes[..., :2]
        centre = boxes[..., :2] + 0.5 * size
        dx, dy, dw, dh = (d / w for d, w in zip(deltas.unbind(-1), self.weights, strict=True))
        move = torch.stack([dx, dy], dim=-1)
        grow = torch.stack([dw, dh], dim=-1).clamp(max=self.scale_clamp).exp()
        centre, half = move * size + centre, 0.5 * (grow * size)
        return torch.cat([centre - half, centre + half], dim=-1)


class DecodeDistances(nn.Module):
    """Boxes from distances of their four sides: FCOS, ``Box2BoxTransformLinear``."""

    def __init__(self, transform):
        super().__init__()
        self.by_size = bool(transform.normalize_by_size)

    def forward(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """(..., 4) boxes of (..., 4) deltas and source boxes."""
        deltas = deltas.relu()
        size = boxes[..., 2:] - boxes[..., :2]
        centre = 0.5 * (boxes[..., :2] + boxes[..., 2:])
        if self.by_size:
            deltas = deltas * torch.cat([size, size], dim=-1)
        return torch.cat([centre - deltas[..., :2], centre + deltas[..., 2:]], dim=-1)


class Normalize(nn.Module):
    """uint8 pixels to what the backbone takes: normalised, then padded by zeros below and right."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.register_buffer("mean", model.pixel_mean.clone())
        self.register_buffer("std", model.pixel_std.clone())
        self.divisibility = max(model.backbone.size_divisibility, 1)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.float() - self.mean) / self.std
        height, width = images.shape[-2:]
        unit = self.divisibility
        padded = [(size + unit - 1) // unit * unit for size in (height, width)]
        return F.pad(pixels, (0, padded[1] - width, 0, padded[0] - height))


def detections(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    classes: Tensor,
    *,
    num_classes: int,
    size: tuple,
    number: int,
    iou: float,
    keep: KeepByNms,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Suppress, take the best, clip, drop what has no area.

    Args:
        boxes, scores, valid, classes: (N, M, 4), (N, M), (N, M) bool, (N, M) int64.
        size: height and width of the images.
        number: most detections of an image.
        iou: from which one box suppresses another of its class.

    Returns:
        tuple[Tensor, ...]: boxes (N, K, 4), scores (N, K), classes (N, K) int64 and counts (N,)
            int64; the first ``counts`` rows of an image are its detections by falling score, the
            others are zero.
    """
    valid = valid & keep(boxes, by_group(scores, valid, classes, num_classes), iou)
    scores, valid, boxes, classes = best(scores, valid, number, boxes, classes)
    boxes = clip(boxes, *size)
    scores, valid, boxes, classes = best(scores, valid & has_area(boxes), number, boxes, classes)
    boxes = torch.where(valid[..., None], boxes, 0.0)
    return boxes, torch.where(valid, scores, 0.0), torch.where(valid, classes, 0), valid.sum(1)
