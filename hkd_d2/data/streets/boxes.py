"""Boxes of painted people."""

import math

import numpy as np

ASPECT = 0.41  # width over height of a pedestrian's box, as CityPersons was annotated


def aligned(full, visible, image_width):
    """The boxes of a walker in CityPersons' convention: head to feet, ``ASPECT`` times as wide.

    Both boxes are stretched alike about the middle of the body, so that the visible share stays.
    """
    x, y, w, h = full
    wide = max(round(ASPECT * h), 1)
    left = math.floor(x + w / 2 - wide / 2)
    stretch = wide / w
    start = max(round(left + (visible[0] - x) * stretch), left, 0)
    end = min(round(left + (visible[0] + visible[2] - x) * stretch), left + wide, image_width)
    # A sliver may round to nothing, or be stretched out of the picture: keep one column of it.
    start = min(start, left + wide - 1, image_width - 1)
    end = max(end, start + 1)
    return [left, y, wide, h], [start, visible[1], end - start, visible[3]]


def tight_box(mask):
    """[x, y, w, h] of the True part of a mask; zeros where there is none."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not columns.size:
        return [0, 0, 0, 0]
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
