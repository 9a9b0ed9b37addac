"""Writers of small data sets in the form that each has on disk; the images are plain pictures."""

import json
from pathlib import Path

from PIL import Image


def write_image(path: Path, size: tuple[int, int] = (120, 160)) -> None:
    """A grey picture of ``size`` (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (90, 120, 140)).save(path)


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_crowdhuman(root: Path, split: str, images: dict[str, list[dict]]) -> None:
    """``images``: rows (gtboxes) by ID."""
    for name in images:
        write_image(root / "Images" / f"{name}.jpg")
    lines = (json.dumps({"ID": name, "gtboxes": rows}) for name, rows in images.items())
    write_text(root / f"annotation_{split}.odgt", *lines)


def write_widerperson(root: Path, split: str, images: dict[str, list[tuple]]) -> None:
    """``images``: rows (class, x1, y1, x2, y2) by name."""
    for name, rows in images.items():
        write_image(root / "Images" / f"{name}.jpg")
        rows = (" ".join(map(str, row)) for row in rows)
        write_text(root / "Annotations" / f"{name}.jpg.txt", str(len(images[name])), *rows)
    write_text(root / f"{split}.txt", *images)


def write_eurocity(root: Path, time: str, split: str, images: dict[str, list[dict]]) -> None:
    """``images``: children by <city>/<stem>."""
    for name, children in images.items():
        write_image(root / time / "img" / split / f"{name}.png", (120, 160))
        frame = {
            "tags": [],
            "imageheight": 120,
            "imagewidth": 160,
            "identity": "frame",
            "children": children,
        }
        write_text(root / time / "labels" / split / f"{name}.json", json.dumps(frame))


def write_mot(root: Path, sequence: str, length: int, rows: list[tuple]) -> None:
    """``rows``: (frame, track, x, y, w, h, flag, class, visibility), pixels counted from 1."""
    folder = root / "train" / sequence
    for frame in range(1, length + 1):
        write_image(folder / "img1" / f"{frame:06d}.jpg")
    write_text(
        folder / "seqinfo.ini",
        "[Sequence]",
        f"name={sequence}",
        "imDir=img1",
        "frameRate=30",
        f"seqLength={length}",
        "imWidth=160",
        "imHeight=120",
        "imExt=.jpg",
    )
    write_text(folder / "gt" / "gt.txt", *(",".join(map(str, row)) for row in rows))


def write_pennfudan(root: Path, images: dict[str, list[tuple]]) -> None:
    """``images``: corners (xmin, ymin, xmax, ymax), counted from 1, by name."""
    for name, boxes in images.items():
        write_image(root / "PNGImages" / f"{name}.png")
        lines = [
            "# Compatible with PASCAL Annotation Version 1.00",
            f'Image filename : "PennFudanPed/PNGImages/{name}.png"',
            "Image size (X x Y x C) : 160 x 120 x 3",
            'Database : "The Penn-Fudan-Pedestrian Database"',
            f"Objects with ground truth : {len(boxes)} {{ "
            + '"PASpersonWalking" ' * len(boxes)
            + "}",
            "# Top left pixel co-ordinates : (1, 1)",
        ]
        for i, (x1, y1, x2, y2) in enumerate(boxes, start=1):
            lines += [
                f'# Details for pedestrian {i} ("PASpersonWalking")',
                f'Original label for object {i} "PASpersonWalking" : "PennFudanPed"',
                f'Bounding box for object {i} "PASpersonWalking" (Xmin, Ymin) - (Xmax, Ymax) : '
                f"({x1}, {y1}) - ({x2}, {y2})",
                f'Pixel mask for object {i} "PASpersonWalking" : '
                f'"PennFudanPed/PedMasks/{name}_mask.png"',
                "",
            ]
        write_text(root / "Annotation" / f"{name}.txt", *lines)


def person(x, y, w, h, **row) -> dict:
    """A row of CrowdHuman, half of it visible."""
    return {
        "tag": "person",
        "fbox": [x, y, w, h],
        "vbox": [x, y, w, h // 2],
        "hbox": [x, y, w // 2, w // 2],
        "head_attr": {"ignore": 0, "occ": 1, "unsure": 0},
        "extra": {"box_id": 0, "occ": 1},
        **row,
    }


def child(identity, x0, y0, x1, y1, *tags, children=()) -> dict:
    """A row of EuroCity Persons."""
    box = {"x0": x0, "y0": y0, "x1": x1, "y1": y1}
    return {"identity": identity, **box, "tags": list(tags), "children": list(children)}


# A sample of each format: what writes it under a folder, and its split. Each has two images, with
# two rows in the first: [20, 30, 30, 60], which counts, and [90, 30, 30, 60], which is ignored but
# in Penn-Fudan.
SAMPLES = {
    "crowdhuman": (
        lambda root: write_crowdhuman(
            root,
            "val",
            {"1,a": [person(20, 30, 30, 60), person(90, 30, 30, 60, tag="mask")], "b": []},
        ),
        "val",
    ),
    "eurocity": (
        lambda root: write_eurocity(
            root,
            "night",
            "val",
            {
                "basel/basel_00000": [
                    child("pedestrian", 20, 30, 50, 90, "occluded>40"),
                    child("rider", 90, 30, 120, 90),
                ],
                "basel/basel_00001": [],
            },
        ),
        "night_val",
    ),
    "mot17": (
        lambda root: write_mot(
            root,
            "MOT17-02-FRCNN",
            2,
            [(1, 1, 21, 31, 30, 60, 1, 1, 0.5), (1, 2, 91, 31, 30, 60, 0, 8, 1)],
        ),
        "train",
    ),
    "mot20": (
        lambda root: write_mot(
            root,
            "MOT20-01",
            2,
            [(1, 1, 21, 31, 30, 60, 1, 1, 0.5), (1, 2, 91, 31, 30, 60, 0, 6, 1)],
        ),
        "train",
    ),
    "pennfudan": (
        lambda root: write_pennfudan(
            root, {"FudanPed00001": [(21, 31, 50, 90), (91, 31, 120, 90)], "PennPed00001": []}
        ),
        "all",
    ),
    "widerperson": (
        lambda root: write_widerperson(
            root, "val", {"000040": [(1, 20, 30, 50, 90), (5, 90, 30, 120, 90)], "000041": []}
        ),
        "val",
    ),
}
