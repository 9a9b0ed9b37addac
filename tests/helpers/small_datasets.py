"""Writers of small data sets in the form that each has on disk; the images are plain pictures."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import scipy.io
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


def jpeg(grey: int, size: tuple[int, int]) -> bytes:
    """A JPEG file of one grey, of ``size`` (height, width)."""
    content = io.BytesIO()
    Image.new("L", size[::-1], grey).save(content, "JPEG")
    return content.getvalue()


def write_seq(
    path: Path, frames: list[bytes], gap=16, form=102, stated=None, size=(480, 640)
) -> None:
    """A Norpix sequence of JPEG ``frames``; ``gap`` bytes follow each, 16 or 8."""
    header = struct.pack("<I", 0xFEED) + "Norpix seq\0\0".encode("utf-16-le")
    header += struct.pack("<iI", 3, 1024) + "a description".encode("utf-16-le").ljust(512, b"\0")
    height, width = size
    length = len(frames) if stated is None else stated
    pixels = height * width
    header += struct.pack("<9Id", width, height, 8, 8, pixels, form, length, 0, pixels + 512, 30.0)
    content = header.ljust(1024, b"\0")
    for i, frame in enumerate(frames):
        time = struct.pack("<IH", 1000 + i, 33)
        content += struct.pack("<I", len(frame) + 4) + frame + time.ljust(gap, b"\0")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_vbb(path: Path, length: int, labels: list[str], rows: dict[int, list[tuple]]) -> None:
    """Annotations of a video; ``rows``: (id, pos, posv) by frame, all counted from 1."""
    fields = [(name, object) for name in ("id", "pos", "occl", "lock", "posv")]
    frames = np.empty((1, length), dtype=object)
    for frame in range(1, length + 1):
        objects = rows.get(frame, [])
        if not objects:
            frames[0, frame - 1] = np.zeros((0, 0))
            continue
        cell = np.empty((1, len(objects)), dtype=fields)
        for i, (number, pos, posv) in enumerate(objects):
            pos, posv = np.array([pos], dtype=float), np.array([posv], dtype=float)
            cell[0, i] = (float(number), pos, float(posv.any()), 0.0, posv)
        frames[0, frame - 1] = cell
    names = np.empty((1, len(labels)), dtype=object)
    names[0, :] = labels
    ones = np.ones((1, len(labels)))
    content = {
        "nFrame": float(length),
        "objLists": frames,
        "maxObj": float(len(labels)),
        "objInit": ones,
        "objLbl": names,
        "objStr": ones,
        "objEnd": length * ones,
        "objHide": 0 * ones,
        "altered": 0.0,
        "log": np.zeros((1, 1)),
        "logLen": 1.0,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        scipy.io.savemat(f, {"A": content, "vers": 1.4})


def write_bbgt(path: Path, *rows: str) -> None:
    """A bbGt text file."""
    write_text(path, "% bbGt version=3", *rows)


def write_caltech_new(root: Path, split: str, images: dict[str, list[str]]) -> None:
    """New annotations and frames; ``images``: rows by setXX_VYYY_IZZZZZ."""
    folder = {
        "train_new": "anno_train_1xnew",
        "train10x_new": "anno_train10x_alignedby_RotatedFilters",
        "test_new": "anno_test_1xnew",
    }[split]
    ending = ".txt" if split == "train10x_new" else ".jpg.txt"
    for stem, rows in images.items():
        write_image(root / "images" / f"{stem}.jpg", (480, 640))
        write_bbgt(root / "annotations" / folder / f"{stem}{ending}", *rows)


def write_kaist(root: Path, images: dict[str, list[str]]) -> None:
    """Original annotations, images and list of the test set; ``images``: rows by frame."""
    for name, rows in images.items():
        folder, frame = name.rsplit("/", 1)
        write_image(root / "images" / folder / "visible" / f"{frame}.jpg", (512, 640))
        write_bbgt(root / "annotations" / folder / f"{frame}.txt", *rows)
    write_text(root / "imageSets" / "test-all-20.txt", *images)


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
    "caltech": (
        lambda root: write_caltech_new(
            root,
            "test_new",
            {
                "set06_V000_I00029": [
                    "person 21 31 30 60 0 0 0 0 0 0 0",
                    "ignore 91 31 30 60 0 0 0 0 0 1 0",
                ],
                "set06_V000_I00059": [],
            },
        ),
        "test_new",
    ),
    "kaist": (
        lambda root: write_kaist(
            root,
            {
                "set06/V000/I00019": [
                    "person 20 30 30 60 1 0 0 0 0 0 0",
                    "cyclist 90 30 30 60 0 0 0 0 0 0 0",
                ],
                "set06/V000/I00039": [],
            },
        ),
        "test_original",
    ),
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
