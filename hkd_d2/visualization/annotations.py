"""Samples of a data set with what is annotated in them."""

import math
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hkd_d2.data.images import read_data_image
from hkd_d2.data.mapper import is_ignored
from hkd_d2.visualization.detections import DPI, draw_box

# What a row is, with colour (Okabe and Ito) and dashes; the last is the visible part of any row.
ROLES = {
    "pedestrian": ("#009E73", "-"),
    "ignored": ("#E69F00", "-."),
    "crowd": ("#CC79A7", ":"),
    "visible part": ("#56B4E9", "--"),
}


def row_role(row: dict, min_height: float = 0.0, min_visibility: float = 0.0) -> str:
    """Role of a record's row in training: "crowd", "ignored" or "pedestrian".

    Args:
        row: an annotation.
        min_height, min_visibility: HKD.DATA.MIN_HEIGHT and MIN_VISIBILITY, below which training
            ignores a row; the defaults leave its own flags alone.
    """
    if row.get("iscrowd"):
        return "crowd"
    return "ignored" if is_ignored(row, min_height, min_visibility) else "pedestrian"


def count_roles(
    records: list[dict], min_height: float = 0.0, min_visibility: float = 0.0
) -> dict[str, int]:
    """Number of rows of each role, and of those whose visible part is known and not the whole."""
    counts = dict.fromkeys(ROLES, 0)
    for record in records:
        for row in record["annotations"]:
            counts[row_role(row, min_height, min_visibility)] += 1
            counts["visible part"] += _has_visible_part(row)
    return counts


def plain_text(text: str) -> str:
    """A name for a figure: bytes that are not UTF-8 and control characters as "\ufffd"."""
    text = os.fsencode(text).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def sample_records(records: list[dict], number: int, seed: int = 0) -> list[dict]:
    """Draw ``number`` records with rows, or all of them where there are fewer, in their order.

    Records without rows are drawn only where too few have any.
    """
    chance = np.random.default_rng(seed).random(len(records))
    # Those with rows first, in drawn order.
    order = sorted(range(len(records)), key=lambda i: (not records[i]["annotations"], chance[i]))
    return [records[i] for i in sorted(order[:number])]


def draw_annotations(
    axes: Axes,
    image: np.ndarray,
    rows: list[dict],
    min_height: float = 0.0,
    min_visibility: float = 0.0,
) -> None:
    """Draw one image with its rows' boxes; boxes may leave the image.

    Args:
        axes: matplotlib axes to draw on.
        image: uint8 (H, W, 3) RGB.
        rows: annotations of a record, boxes [x, y, w, h] in pixels of the image.
        min_height, min_visibility: see :func:`row_role`.
    """
    axes.imshow(image, interpolation="lanczos")
    axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    axes.set(xticks=[], yticks=[])
    # Beneath the boxes, and wider: most of their edges lie on those of the whole box.
    for row in filter(_has_visible_part, rows):
        draw_box(axes, _corners(row["vis_bbox"]), *ROLES["visible part"], width=2.4)
    # Pedestrians on top of the regions that hold them.
    roles = [row_role(row, min_height, min_visibility) for row in rows]
    for role, row in sorted(zip(roles, rows, strict=True), key=lambda x: x[0] == "pedestrian"):
        draw_box(axes, _corners(row["bbox"]), *ROLES[role], width=1.3)


def plot_samples(
    records: list[dict],
    path: str | os.PathLike,
    title: str = "",
    min_height: float = 0.0,
    min_visibility: float = 0.0,
) -> dict[str, int]:
    """Write a picture of samples of a data set with the boxes of every row, and a legend.

    Args:
        records: what to draw (see :mod:`hkd_d2.data.datasets.records`).
        path: PNG, PDF or SVG to write; its folder is made.
        title: above the picture.
        min_height, min_visibility: see :func:`row_role`.

    Returns:
        dict: how many rows of each role were drawn (:data:`ROLES`), as the legend says.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: no records, or an image that is not of the stated size.
    """
    if not records:
        raise ValueError("There is nothing to draw; give at least one record.")
    columns = math.ceil(math.sqrt(len(records)))
    lines = math.ceil(len(records) / columns)
    # Wide enough for a pedestrian of 50 pixels in a sample of 2048.
    width = 8.0 if columns < 3 else 6.0
    aspect = max(record["height"] / record["width"] for record in records)
    figure = Figure(
        figsize=(columns * width, lines * (width * aspect + 0.4) + 0.9), layout="constrained"
    )
    cells = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in cells[len(records) :]:
        axes.set_axis_off()
    for axes, record in zip(cells, records, strict=False):
        if not os.path.isfile(record["file_name"]):
            raise FileNotFoundError(
                f"{record['file_name']}: no such image; put it there or correct the image folder."
            )
        image = read_data_image(record["file_name"])
        if image.shape[:2] != (record["height"], record["width"]):
            raise ValueError(
                f"{record['file_name']}: the image is {image.shape[1]}x{image.shape[0]} and the "
                f"annotations state {record['width']}x{record['height']}; use the images that the "
                "annotations were made for."
            )
        draw_annotations(axes, image, record["annotations"], min_height, min_visibility)
        counts = count_roles([record], min_height, min_visibility)
        axes.set_title(
            f"{plain_text(os.path.basename(record['file_name']))}: {counts['pedestrian']} to find, "
            f"{counts['ignored'] + counts['crowd']} ignored",
            fontsize=9,
            parse_math=False,  # a name may hold a dollar sign
        )
    counts = count_roles(records, min_height, min_visibility)
    handles = [
        Line2D([], [], color=colour, linestyle=dash, linewidth=2, label=f"{role}: {counts[role]}")
        for role, (colour, dash) in ROLES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(plain_text(title), fontsize=11, parse_math=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return counts


def _has_visible_part(row: dict) -> bool:
    visible = row.get("vis_bbox")
    return visible is not None and visible[2] * visible[3] > 0 and visible != row["bbox"]


def _corners(bbox: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = bbox
    return x, y, x + width, y + height
