"""KAIST Multispectral Pedestrian, the visible images: campus, road and downtown, day and night.

Under one root folder::

    images/setXX/VYYY/visible/IZZZZZ.jpg             640x512
    imageSets/train-all-02.txt, test-all-20.txt      frames as setXX/VYYY/IZZZZZ, one a line
    annotations/setXX/VYYY/IZZZZZ.txt                (original) bbGt text
    sanitized_annotations/setXX_VYYY_IZZZZZ.txt      (Li et al., BMVC 2018) bbGt text, training
    annotations_paired/setXX/VYYY/visible/IZZZZZ.txt (Zhang et al., ICCV 2019) bbGt text, training
    kaist_annotations_test20.json                    (Liu et al., BMVC 2016) COCO JSON, test

The last one is what methods are compared on (sejong-rcv/MLPD-Multi-Label-Pedestrian-Detection,
src, 5b643f3). Sets 00 to 05 train, 06 to 11 test; 00 to 02 and 06 to 08 are by day. Boxes are those
of the files: no source says that their pixels are counted from 1.

Hwang, Park, Kim, Choi, Kweon: Multispectral Pedestrian Detection: Benchmark Dataset and Baselines,
CVPR 2015.
"""

import os
import re
from collections import defaultdict

from hkd_d2.data.cache import cached_records
from hkd_d2.data.datasets.bbgt import labelled_annotation, read_bbgt, visible_share
from hkd_d2.data.datasets.coco import load_coco, read_coco
from hkd_d2.data.datasets.formats import folder_format
from hkd_d2.data.datasets.records import check_images_exist, check_split
from hkd_d2.data.text_files import read_lines, shown

SPLITS = (
    "train",
    "train_sanitized",
    "train_paired",
    "test",
    "test_day",
    "test_night",
    "test_original",
)
# Counted in kaist_annotations_test20.json.
PUBLISHED = {
    "test": {"images": 2252, "rows": 4254},
    "test_day": {"images": 1455},
    "test_night": {"images": 797},
}

IMAGE_SIZE = (512, 640)
DAY = ("set06", "set07", "set08")
TEST_JSON = "kaist_annotations_test20.json"

_FRAME = re.compile(r"(set\d\d)/(V\d\d\d)/(I\d{5})")


@folder_format("kaist", SPLITS)
def load_kaist(root: str, split: str, *, check_images: bool = True) -> list[dict]:
    """Load one split.

    In the text files ``person`` counts unless the file's flag ignores it; ``people`` (``iscrowd``
    too), ``person?``, ``person?a`` and ``cyclist`` are ignored. In the JSON the file's flags hold.

    ``occlusion`` (int) is 0, 1 (partial) or 2 (heavy). The visible share is known of rows with a
    visible box alone, and 1 elsewhere. ``label`` is that of the text files.

    Args:
        root: folder of the data set.
        split: one of :data:`SPLITS`: ``train`` and ``test_original`` have the original annotations,
            ``test``, ``test_day`` and ``test_night`` the improved ones.
        check_images: check that every image file exists.

    Returns:
        list[dict]: records (see :mod:`hkd_d2.data.datasets.records`), those of the JSON with its
        ids, which begin at 0, the others in the order of the list with the ids 1, 2, ...

    Raises:
        FileNotFoundError: a folder, a file or an image is missing.
        ValueError: an unknown split, or a damaged file; the message names file and row.
    """
    root = check_split("KAIST", SPLITS, root, split)
    if split in ("test", "test_day", "test_night"):
        source = os.path.join(root, TEST_JSON)
        if not os.path.isfile(source):
            raise FileNotFoundError(
                f"{source}: no such file; put the improved test annotations there, or "
                "take the split test_original."
            )
        records = cached_records(f"kaist-{split}", root, [source], lambda: _read_json(root, split))
    else:
        frames = _frames(root, split)
        source = frames[0][1]
        lists = [path for path in [_list_path(root, split)] if path]
        records = cached_records(
            f"kaist-{split}",
            root,
            [*lists, *(path for _, path in frames)],
            lambda: [_read_text(root, *frame, i) for i, frame in enumerate(frames, start=1)],
        )
    if check_images:
        check_images_exist(records, source)
    return records


def _list_path(root: str, split: str) -> str | None:
    """The list of a split's frames; the sanitized annotations are their own."""
    name = {
        "train": "train-all-02.txt",
        "train_paired": "train-all-02.txt",
        "test_original": "test-all-20.txt",
    }.get(split)
    return name and os.path.join(root, "imageSets", name)


def _frames(root: str, split: str) -> list[tuple[str, str]]:
    """Name and annotation file of every frame of a split with text files."""
    listed = _list_path(root, split)
    if listed is None:
        folder = os.path.join(root, "sanitized_annotations")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        names = sorted(name for name in names if name.endswith(".txt"))
        frames = [(name[:-4].replace("_", "/"), os.path.join(folder, name)) for name in names]
        listed = folder
        rows = [f"file {name}" for name in names]
    else:
        lines = read_lines(listed, "unpack the lists of frames there.")
        names = [line.strip() for line in lines]
        folder = "annotations_paired" if split == "train_paired" else "annotations"
        inner = "visible" if split == "train_paired" else ""
        frames = [
            (
                name,
                os.path.join(
                    root, folder, os.path.dirname(name), inner, f"{os.path.basename(name)}.txt"
                ),
            )
            for name in names
        ]
        rows = [f"line {i}" for i in range(1, len(names) + 1)]
    if not frames:
        raise FileNotFoundError(f"{listed}: no frame of split '{split}'; unpack the files there.")
    for (name, path), row in zip(frames, rows, strict=True):
        if not _FRAME.fullmatch(name):
            raise ValueError(
                f"{listed}: {row}: a frame such as set00/V000/I00001 is expected, not "
                f"{shown(name)}."
            )
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path}: no such file; unpack the annotations of split '{split}' there."
            )
    return frames


def _read_text(root: str, name: str, path: str, image_id: int) -> dict:
    annotations = [
        {
            **labelled_annotation(
                label,
                bbox,
                vis_bbox,
                visible_share(bbox, occlusion > 0, vis_bbox),
                ignore or label != "person",
                where,
                IMAGE_SIZE,
            ),
            "occlusion": occlusion,
        }
        for label, bbox, occlusion, vis_bbox, ignore, where in read_bbgt(path)
    ]
    return {
        "file_name": _image_path(root, name),
        "image_id": image_id,
        "height": IMAGE_SIZE[0],
        "width": IMAGE_SIZE[1],
        "annotations": annotations,
    }


def _read_json(root: str, split: str) -> list[dict]:
    path = os.path.join(root, TEST_JSON)
    ids = defaultdict(list)  # in the order of the rows; evaluation asks for the id 0
    for row in read_coco(path)["annotations"]:
        ids[row.get("image_id")].append(row.get("id"))
    records = []
    for record in load_coco(path, "", check_images=False):
        name = record["file_name"]
        if not _FRAME.fullmatch(name):
            raise ValueError(
                f"{path}: an im_name such as set06/V000/I00019 is expected, not {shown(name)}."
            )
        for row, row["id"] in zip(record["annotations"], ids[record["image_id"]], strict=True):
            if row["category_id"] != 0 or row.get("occlusion") not in (0, 1, 2):
                raise ValueError(
                    f"{path}: {name}: every annotation must have category_id 1 and an occlusion 0 "
                    "to 2; fetch the file again."
                )
        if split == "test" or (split == "test_day") == name.startswith(DAY):
            records.append({**record, "file_name": _image_path(root, name)})
    return records


def _image_path(root: str, name: str) -> str:
    folder, frame = os.path.split(name)
    return os.path.join(root, "images", folder, "visible", f"{frame}.jpg")
