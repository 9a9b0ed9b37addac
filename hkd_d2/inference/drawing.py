"""Detections drawn onto images, pixel for pixel; needs Pillow alone."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hkd_d2.inference.detections import Detections

# Colours of the classes in turn, of Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
# Ours: pixels of the shorter side for one of a line's width, and for one of a letter's height.
SIDE_PER_LINE = 400
SIDE_PER_LETTER = 45
SMALLEST_LETTERS = 10
GAP = 4  # between panels


def draw_boxes(image: np.ndarray, found: Detections) -> np.ndarray:
    """A copy of an image with boxes, and the score of each above it.

    A class has its colour, and its name stands before the score where the detector knows several.

    Args:
        image: (H, W, 3) uint8 RGB.
        found: boxes in pixels of the image.

    Returns:
        ndarray: (H, W, 3) uint8 RGB.
    """
    picture = Image.fromarray(image)
    canvas = ImageDraw.Draw(picture)
    width, font = max(2, round(min(picture.size) / SIDE_PER_LINE)), _font(image.shape)
    # The best is drawn last, over the others.
    for box, score, label in list(zip(found.boxes, found.scores, found.classes, strict=True))[::-1]:
        colour = COLOURS[label % len(COLOURS)]
        # Box coordinates are edges of pixels; the line is drawn inside them.
        x1, y1, x2, y2 = (int(v) for v in np.round(box))
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)
        canvas.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black")
        canvas.rectangle((x1, y1, x2, y2), outline=colour, width=width)
        text = f"{score:.2f}"
        if len(found.class_names) > 1:
            text = f"{found.class_names[label]} {text}"
        _, _, right, bottom = canvas.textbbox((0, 0), text, font=font)
        x = max(0, min(x1, picture.width - right - 2))
        y = y1 - bottom - 2 if y1 >= bottom + 2 else y1 + width
        canvas.rectangle((x, y, x + right + 2, y + bottom + 1), fill=colour)
        canvas.text((x + 1, y), text, fill="black", font=font)
    return np.asarray(picture)


def draw_side_by_side(image: np.ndarray, found: Mapping[str, Detections]) -> np.ndarray:
    """The image with the boxes of each detector, side by side under the detectors' names.

    Args:
        image: (H, W, 3) uint8 RGB.
        found: detections by the detector's name; one alone has no name above it.

    Returns:
        ndarray: (H', W', 3) uint8 RGB; the image's own size where there is one detector.
    """
    panels = [draw_boxes(image, detections) for detections in found.values()]
    if len(panels) == 1:
        return panels[0]
    height, width = image.shape[:2]
    font = _font(image.shape)
    bar = 2 * round(font.size)
    picture = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + bar), "white")
    canvas = ImageDraw.Draw(picture)
    for number, (name, panel) in enumerate(zip(found, panels, strict=True)):
        x = number * (width + GAP)
        caption = Image.new("RGB", (width, bar), "white")  # of its own, which cuts a long name off
        ImageDraw.Draw(caption).text(
            (2, bar // 2), f"{name}: {len(found[name])}", fill="black", font=font, anchor="lm"
        )
        picture.paste(caption, (x, 0))
        picture.paste(Image.fromarray(panel), (x, bar))
        if number:
            canvas.rectangle((x - GAP, 0, x - 1, picture.height), fill="black")
    return np.asarray(picture)


def _font(shape):
    return ImageFont.load_default(max(SMALLEST_LETTERS, min(shape[:2]) / SIDE_PER_LETTER))
