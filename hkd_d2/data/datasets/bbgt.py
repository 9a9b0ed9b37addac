"""Annotation files of Piotr Dollár's toolbox (bbGt, version 3), one text file an image.

A header, then a row an object::

    % bbGt version=3
    person 200 180 24 60 1 200 180 24 30 0 0

label, box x y w h, occlusion (Caltech: 0 or 1, KAIST: 0, 1 or 2), visible box x y w h (all 0 where
unknown), ignore (0 or 1), angle. Source: pdollar/toolbox, detector/bbGt.m (1a0a7eb), bbSave and
bbLoad.
"""

from hkd_d2.data.datasets.records import make_annotation, visible_ratio
from hkd_d2.data.text_files import read_lines, shown


def read_bbgt(path: str) -> list[tuple[str, list[float], int, list[float], int, str]]:
    """Read a file.

    Returns:
        list[tuple]: of each row the label, the box, its occlusion, the visible box, the ignore flag
        and a name of the row for messages; boxes [x, y, w, h] as the file has them.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: another version, or a malformed row; the message names the line.
    """
    lines = read_lines(path, "unpack the annotations there.")
    if not lines or lines[0].split() != ["%", "bbGt", "version=3"]:
        raise ValueError(
            f"{path}: the first line must be '% bbGt version=3'; the file is empty or of another "
            "format, fetch it again."
        )
    rows = []
    for i, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        where = f"{path}: line {i}"
        try:
            label, *numbers = line.split()
            x, y, w, h, occlusion, vx, vy, vw, vh, ignore, _ = map(float, numbers)
            if occlusion not in (0, 1, 2) or ignore not in (0, 1):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{where}: 'label x y w h occlusion vx vy vw vh ignore angle' is expected, with an "
                f"occlusion 0 to 2 and ignore 0 or 1, not {shown(line)}; if the file ends there, "
                "it is truncated."
            ) from None
        rows.append((label, [x, y, w, h], int(occlusion), [vx, vy, vw, vh], int(ignore), where))
    return rows


def visible_share(bbox: list[float], occluded: bool, vis_bbox: list[float]) -> float:
    """The toolbox's visible share of a row.

    It is 1 where the row is not marked occluded or has no visible box, 0 where the visible box is
    the whole one, which stands for barely visible, and the ratio of the areas otherwise.
    """
    if not occluded or not any(vis_bbox):
        return 1.0
    return 0.0 if vis_bbox == bbox else visible_ratio(bbox, vis_bbox)


def labelled_annotation(
    label: str,
    bbox: list[float],
    vis_bbox: list[float],
    vis_ratio: float,
    ignore: bool,
    where: str,
    image_size: tuple[int, int],
) -> dict:
    """A record's row that keeps the file's ``label``.

    A row outside the image is ignored: tracks go on where a person has left it. ``people`` are a
    crowd where they are ignored.

    Args:
        bbox, vis_bbox: [x, y, w, h] in pixels counted from 0; a visible box of zeros is none.
        where, image_size: as :func:`hkd_d2.data.datasets.records.make_annotation` has them.
    """
    x, y, w, h = bbox
    outside = x >= image_size[1] or y >= image_size[0] or x + w <= 0 or y + h <= 0
    ignore = bool(ignore or outside)
    annotation = make_annotation(
        bbox,
        where=where,
        image_size=image_size,
        ignore=ignore,
        iscrowd=ignore and label == "people",
        vis_bbox=vis_bbox if any(vis_bbox) else None,
        vis_ratio=vis_ratio,
    )
    return {**annotation, "label": label}
