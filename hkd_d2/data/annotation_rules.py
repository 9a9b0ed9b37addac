"""Meaning of a COCO row where its keys leave room: one rule for every reader.

Training's loader, the evaluator and the result tools read heights, visible shares, ignore flags,
whole numbers and the pedestrians' category by these functions, so that one file has one meaning.
Needs nothing but Python.

``ignore``
    A row is ignored if ``ignore`` or ``iscrowd`` is 1. Where ``ignore`` is missing it is
    ``iscrowd``, and that is 0 where missing.
``height``
    That of the box where missing or null.
``vis_ratio``
    Where missing or null, the area of ``vis_bbox`` over that of ``bbox``; 1 where that is missing
    too.
"""

import sys
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from hkd_d2.data.text_files import shown

__all__ = [
    "PEDESTRIAN_NAMES",
    "ignore_flags",
    "is_finite",
    "pedestrian_category",
    "row_height",
    "visible_share",
    "whole_number",
]

PEDESTRIAN_NAMES = ("pedestrian", "person")  # the first of them that a file has

Row = Mapping[str, Any]


def ignore_flags(row: Row, where: str) -> tuple[int, int]:
    """``ignore`` and ``iscrowd`` of a row; it counts if both are 0.

    Args:
        row: an annotation.
        where: names file and row in the message.

    Raises:
        ValueError: a flag that is neither 0 nor 1.
    """
    crowd = row.get("iscrowd", 0)
    flags = {"ignore": row.get("ignore", crowd), "iscrowd": crowd}
    for key, flag in flags.items():
        if not isinstance(flag, Real) or flag not in (0, 1):
            raise ValueError(f"{where} has {key} {shown(flag)}; make it 0 or 1.")
    return int(flags["ignore"]), int(flags["iscrowd"])


def row_height(row: Row, where: str) -> float:
    """Height of a row in pixels.

    Raises:
        ValueError: a height that is no finite number of 0 or more.
    """
    height = row.get("height")
    return _quantity("height", row["bbox"][3] if height is None else height, where)


def visible_share(row: Row, where: str) -> float:
    """Visible share of a row's body.

    Raises:
        ValueError: a share that is no finite number of 0 or more, or a malformed ``vis_bbox``.
    """
    if row.get("vis_ratio") is not None:
        return _quantity("vis_ratio", row["vis_ratio"], where)
    visible = row.get("vis_bbox")
    if visible is None:
        return 1.0
    if not (
        isinstance(visible, list | tuple) and len(visible) == 4 and all(map(is_finite, visible))
    ):
        raise ValueError(
            f"{where} has vis_bbox {shown(visible)}; make it four numbers [x, y, w, h]."
        )
    area = row["bbox"][2] * row["bbox"][3]
    share = visible[2] * visible[3] / area if area > 0 else 0.0
    return _quantity("a visible share of", share, where)


def whole_number(value: Any, key: str, where: str) -> int:
    """A whole number, which some programs write as 192.0.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, Real) and not isinstance(value, bool) and is_finite(value):
        if value == int(value):
            return int(value)
    raise ValueError(f"{where} has {key} {shown(value)}; make it a whole number.")


def pedestrian_category(categories: Iterable[Row], used: Iterable[int], source: str) -> int:
    """Id of the category that holds the pedestrians.

    It is the one named "pedestrian", else "person"; else the only one there is; else, where no row
    has another one or the categories have no names, category 1, as the benchmarks' own files have
    it.

    Args:
        categories: the file's list.
        used: the categories of its annotations.
        source: names the file in the message.

    Raises:
        ValueError: none of this holds; the message lists the categories.
    """
    names = {category["id"]: category.get("name") for category in categories}
    used = set(used)
    for wanted in PEDESTRIAN_NAMES:
        found = [number for number, name in names.items() if str(name).strip().lower() == wanted]
        if len(found) == 1:
            return found[0]
    if len(names) == 1:
        return next(iter(names))
    if not names and len(used) == 1:
        return next(iter(used))
    unnamed = not any(names.values())
    if (1 in names and (unnamed or used <= {1})) or not (names or used):
        return 1
    listed = ", ".join(f"{number} {name!r}" for number, name in sorted(names.items(), key=str))
    raise ValueError(
        f"{source} does not say which category the pedestrians are: it has "
        f"{listed or 'no categories, and rows of ' + ', '.join(map(str, sorted(used)))}; name one "
        f"of them {' or '.join(map(repr, PEDESTRIAN_NAMES))}."
    )


def is_finite(value: Any) -> bool:
    """A finite real number, and no truth value."""
    # As a comparison: math.isfinite raises at integers over the range of floats.
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


def _quantity(key: str, value: Any, where: str) -> float:
    if not is_finite(value) or value < 0:
        raise ValueError(f"{where} has {key} {shown(value)}; make it a number of 0 or more.")
    return value
