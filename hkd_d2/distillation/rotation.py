"""Quarter turns of images and of the boxes in them, exact."""

import torch


def turn_images(images: torch.Tensor, turns: int) -> torch.Tensor:
    """Turn (..., H, W) images counter-clockwise by ``turns`` times 90 degrees."""
    return torch.rot90(images, turns, (-2, -1))


def turn_boxes(boxes: torch.Tensor, turns: int, size: tuple[int, int]) -> torch.Tensor:
    """The boxes of images that :func:`turn_images` turns.

    A point (x, y) of an image of width W goes to (y, W - x) in one quarter turn.

    Args:
        boxes: (R, 4) XYXY, pixels.
        size: (H, W) of the images before the turn, padding included.
    """
    height, width = size
    for _ in range(turns % 4):
        x1, y1, x2, y2 = boxes.unbind(1)
        boxes = torch.stack((y1, width - x2, y2, width - x1), 1)
        height, width = width, height
    return boxes
