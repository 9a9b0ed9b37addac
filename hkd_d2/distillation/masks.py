"""Weights of a feature map's cells that differ from image to image."""

import torch

from hkd_d2.ops import rasterize_boxes


def focal_weights(
    boxes: list[torch.Tensor],
    ignore_boxes: list[torch.Tensor],
    size: tuple[int, int],
    stride: float,
    foreground_weight: float,
    background_weight: float,
) -> torch.Tensor:
    """FGD's weights of cells (yzd-v/FGD c03a6cf): equal for every object and the background.

    A cell under a box weighs ``foreground_weight`` over the box's height times width in cells,
    under several boxes that of the smallest; a box covers floor(x1 / stride) to ceil(x2 / stride)
    inclusive, rows alike, whatever its size, on every level. Any other cell weighs
    ``background_weight`` over the number of such cells in its image, or 0 under an ignore box.

    Args:
        boxes: per image (R, 4) XYXY in pixels of the padded image.
        ignore_boxes: as ``boxes``.
        size: height and width of the map in cells.
        stride: pixels a cell.

    Returns:
        Tensor: (N, height, width) float32.
    """
    weights = []
    for objects, ignored in zip(boxes, ignore_boxes, strict=True):
        low = torch.floor(objects[:, :2] / stride)
        high = torch.ceil(objects[:, 2:] / stride) + 1
        columns, rows = (
            (low[:, axis, None] <= cells) & (cells < high[:, axis, None])
            for axis, cells in enumerate(
                torch.arange(length, device=objects.device) for length in (size[1], size[0])
            )
        )
        share = (1 / (high - low).prod(1)).float()[:, None, None]
        covered = torch.where(rows[:, :, None] & columns[:, None], share, 0)
        foreground = torch.cat([covered, covered.new_zeros(1, *size)]).amax(0)
        background = (foreground == 0) & ~rasterize_boxes(ignored, size, stride, rule="fgd")
        weights.append(
            foreground_weight * foreground
            + background_weight * background / background.sum().clamp(min=1)
        )
    return torch.stack(weights)
