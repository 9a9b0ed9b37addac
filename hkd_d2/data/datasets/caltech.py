"""Caltech Pedestrian: eleven sets of videos from a car, 640x480, 30 frames a second.

Under one root folder::

    setXX/VYYY.seq                        the videos; videos/setXX/VYYY.seq is found too
    annotations/setXX/VYYY.vbb            (old) every frame of a video, MATLAB
    annotations/anno_train_1xnew/...      (new) Zhang et al. 2016, bbGt text, one file a frame
    annotations/anno_train10x_alignedby_RotatedFilters/...
    annotations/anno_test_1xnew/...
    images/setXX_VYYY_IZZZZZ.jpg          written by hkd data check from the videos

Sets 00 to 05 train, 06 to 10 test. Of a video every 30th frame is used, 29, 59, ... (counted from
0); of 10x training every third, 2, 5, .... The files count frames and pixels from 1, records from
0.

Dollár, Wojek, Schiele, Perona: Pedestrian Detection: An Evaluation of the State of the Art, PAMI
2012; Zhang, Benenson, Omran, Hosang, Schiele: How Far are We from Solving Pedestrian Detection?,
CVPR 2016. Rules: dbEval.m of the benchmark and bbGt.m of pdollar/toolbox (1a0a7eb).
"""

import glob
import os
import re
import sys

from tqdm import tqdm

from hkd_d2.data.cache import cached_records
from hkd_d2.data.datasets.bbgt import labelled_annotation, read_bbgt, visible_share
from hkd_d2.data.datasets.formats import folder_format
from hkd_d2.data.datasets.norpix import NorpixSequence
from hkd_d2.data.datasets.records import check_images_exist, check_split, visible_ratio
from hkd_d2.data.mat_files import read_mat
from hkd_d2.data.text_files import shown

# Old annotations: the sets and which frames. New ones: their folder; the last split has the same
# file as test_new, but applies the border rule.
OLD = {
    "train": (range(0, 6), 30),
    "train10x": (range(0, 6), 3),
    "test": (range(6, 11), 30),
}
NEW = {
    "train_new": "anno_train_1xnew",
    "train10x_new": "anno_train10x_alignedby_RotatedFilters",
    "test_new": "anno_test_1xnew",
    "test_new_border": "anno_test_1xnew",
}
SPLITS = (*OLD, *NEW)

# Counted in the ground-truth files that liuwei16/CSP and hasanirtiza/Pedestron publish.
PUBLISHED = {
    "test": {"images": 4024},
    "test_new": {"images": 4024, "rows": 7596},
    "test_new_border": {"images": 4024, "rows": 7596},
}

IMAGE_SIZE = (480, 640)
# Of dbEval: whoever leaves it is ignored. x0, y0, x1, y1 in pixels counted from 1.
BORDER = (5, 5, 635, 475)

# What the old annotations' rows are; dbEval does not know false alarms of the annotators' detector.
LABELS = ("person", "person?", "people", "ignore")
FALSE_ALARM = "person-fa"

_STEM = re.compile(r"(set\d\d)_(V\d\d\d)_I(\d{5})")


@folder_format("caltech", SPLITS)
def load_caltech(root: str, split: str, *, check_images: bool = True) -> list[dict]:
    """Load one split, a record a frame, in the order of set, video and frame.

    Old annotations, as dbEval reads them: ``person`` counts, ``person?``, ``people`` (``iscrowd``
    too) and ``ignore`` are ignored, ``person-fa`` is left out. A person without a visible box is
    wholly visible.

    New annotations, as bbLoad reads them: ``person``, ``person?`` and ``people`` count unless the
    file's flag ignores them, ``ignore`` never does. ``test_new`` takes the flags of the file;
    ``test_new_border`` besides ignores who leaves :data:`BORDER`. With the Reasonable setup (from
    50 pixels, 65 % visible) 912 boxes count in the published ground truth without that rule and 847
    in the one with it.

    ``label`` is the file's.

    Args:
        root: folder of the data set.
        split: one of :data:`SPLITS`.
        check_images: check that every image file exists.

    Returns:
        list[dict]: records (see :mod:`hkd_d2.data.datasets.records`) with the ids 1, 2, ..., frames
        without rows included.

    Raises:
        FileNotFoundError: a folder, an annotation file or an image is missing.
        ValueError: an unknown split, or a damaged file; the message names file and row.
    """
    root = check_split("Caltech", SPLITS, root, split)
    sources = _annotation_files(root, split)
    records = cached_records(
        f"caltech-{split}",
        root,
        sources,
        lambda: (_old_records if split in OLD else _new_records)(root, split, sources),
    )
    if check_images:
        if not any(os.path.isfile(r["file_name"]) for r in records):
            raise FileNotFoundError(
                f"{os.path.join(root, 'images')}: no frame of split '{split}'; extract them from "
                f"the videos with hkd data check caltech {root} {split}."
            )
        check_images_exist(records, os.path.join(root, "annotations"))
    return records


def prepare(root: str, split: str) -> None:
    """Extract the frames of a split from the videos where they are not there yet.

    The bytes of a frame are copied, not compressed again.

    Raises:
        FileNotFoundError: annotations or a video that is needed are missing.
        ValueError: an unknown split, or a damaged file.
    """
    records = load_caltech(root, split, check_images=False)
    missing = [r["file_name"] for r in records if not os.path.isfile(r["file_name"])]
    os.makedirs(os.path.join(root, "images"), exist_ok=True)
    with tqdm(total=len(missing), unit="frame", disable=not missing, file=sys.stderr) as progress:
        videos = {}
        for path in missing:
            folder, video, frame = _STEM.fullmatch(os.path.basename(path)[:-4]).groups()
            videos.setdefault((folder, video), []).append((int(frame), path))
        for (folder, video), frames in videos.items():
            progress.set_description(f"{folder}/{video}")
            places = [os.path.join(root, *p, folder, f"{video}.seq") for p in ((), ("videos",))]
            place = next(filter(os.path.isfile, places), places[0])
            with NorpixSequence(place) as sequence:
                for frame, path in frames:
                    data = sequence.frame(frame)
                    with open(path + ".part", "wb") as f:
                        f.write(data)
                    os.replace(path + ".part", path)  # whole or not at all
                    progress.update()


def read_vbb(path: str) -> list[list[tuple[str, list[float], list[float], str]]]:
    """Read a .vbb file.

    Returns:
        list[list[tuple]]: of each frame its rows: label, box, visible box (all 0: wholly visible),
        and a name of the row for messages. Boxes are [x, y, w, h] as the file has them.

    Raises:
        ValueError: no .vbb file, for example because it is truncated, or a malformed row.
    """
    try:
        content = read_mat(path, "A")[0, 0]
        length = int(content["nFrame"][0, 0])
        labels = [str(v[0]) if v.size else "" for v in content["objLbl"].ravel()]
        frames = content["objLists"].ravel()
        if len(frames) != length:
            raise ValueError(f"{len(frames)} lists of objects for {length} frames")
    except Exception as error:  # scipy raises a dozen types on a damaged file
        raise ValueError(
            f"{path}: no .vbb file, A with nFrame, objLists and objLbl could not be read "
            f"({type(error).__name__}: {error}); fetch it again."
        ) from error
    rows = []
    for number, objects in enumerate(frames, start=1):
        rows.append([])
        for i, row in enumerate(objects.ravel(), start=1):
            where = f"{path}: frame {number} object {i}"
            try:
                label = labels[int(row["id"][0, 0]) - 1]
                bbox, vis_bbox = ([float(v) for v in row[key].ravel()] for key in ("pos", "posv"))
                if len(bbox) != 4 or len(vis_bbox) != 4 or label not in (*LABELS, FALSE_ALARM):
                    raise ValueError
            except (IndexError, TypeError, ValueError):
                raise ValueError(
                    f"{where}: id of an object labelled {', '.join((*LABELS, FALSE_ALARM))}, pos "
                    "and posv with four numbers are expected; fetch the file again."
                ) from None
            rows[-1].append((label, bbox, vis_bbox, where))
    return rows


def _annotation_files(root: str, split: str) -> list[str]:
    """The annotation files of a split, in the order of its records."""
    folder = os.path.join(root, "annotations")
    if split in OLD:
        sets, _ = OLD[split]
        folders = [os.path.join(folder, f"set{number:02d}") for number in sets]
        paths = [
            p for f in folders for p in sorted(glob.glob(os.path.join(glob.escape(f), "V*.vbb")))
        ]
        if not paths:
            raise FileNotFoundError(
                f"{folder}: no file set{sets[0]:02d}/V000.vbb; unpack the annotations of split "
                f"'{split}' there."
            )
        found = {os.path.dirname(path) for path in paths}
        for empty in folders:
            if empty not in found:
                raise FileNotFoundError(
                    f"{empty}: no file V*.vbb; unpack all annotations of split '{split}' there."
                )
        return paths
    folder = os.path.join(folder, NEW[split])
    paths = (
        [e.path for e in os.scandir(folder) if e.name.endswith(".txt")]
        if os.path.isdir(folder)
        else []
    )
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no file setXX_VYYY_IZZZZZ.txt; unpack the new annotations of split "
            f"'{split}' there."
        )
    return sorted(paths)


def _old_records(root: str, split: str, paths: list[str]) -> list[dict]:
    _, skip = OLD[split]
    records = []
    for path in tqdm(paths, desc=f"caltech {split}", unit="file", disable=None):
        folder, video = os.path.basename(os.path.dirname(path)), os.path.basename(path)[:-4]
        frames = read_vbb(path)
        for frame in range(skip - 1, len(frames), skip):
            annotations = [
                labelled_annotation(
                    label,
                    _from_zero(bbox),
                    _from_zero(vis_bbox),
                    # dbEval asks for the visible box alone, not for the mark of occlusion.
                    visible_ratio(bbox, vis_bbox) if any(vis_bbox) else 1.0,
                    label != "person",
                    where,
                    IMAGE_SIZE,
                )
                for label, bbox, vis_bbox, where in frames[frame]
                if label != FALSE_ALARM
            ]
            stem = f"{folder}_{video}_I{frame:05d}"
            records.append(_record(root, stem, len(records) + 1, annotations))
    return records


def _new_records(root: str, split: str, paths: list[str]) -> list[dict]:
    records = []
    for path in tqdm(paths, desc=f"caltech {split}", unit="file", disable=None):
        # Named after the image with its ending or without.
        stem = os.path.basename(path)[: -len(".txt")].removesuffix(".jpg")
        if not _STEM.fullmatch(stem):
            raise ValueError(
                f"{path}: a name such as set06_V000_I00029.txt is expected; remove the file if it "
                "is no annotation."
            )
        annotations = []
        for label, bbox, occlusion, vis_bbox, ignore, where in read_bbgt(path):
            if label not in LABELS:
                raise ValueError(
                    f"{where}: unknown label {shown(label)}, known are {', '.join(LABELS)}."
                )
            x, y, w, h = bbox
            x0, y0, x1, y1 = BORDER
            inside = x >= x0 and y >= y0 and x + w <= x1 and y + h <= y1
            ignored = ignore or label == "ignore" or (split == "test_new_border" and not inside)
            annotations.append(
                labelled_annotation(
                    label,
                    _from_zero(bbox),
                    _from_zero(vis_bbox),
                    visible_share(bbox, occlusion > 0, vis_bbox),
                    ignored,
                    where,
                    IMAGE_SIZE,
                )
            )
        records.append(_record(root, stem, len(records) + 1, annotations))
    return records


def _record(root: str, stem: str, image_id: int, annotations: list[dict]) -> dict:
    return {
        "file_name": os.path.join(root, "images", f"{stem}.jpg"),
        "image_id": image_id,
        "height": IMAGE_SIZE[0],
        "width": IMAGE_SIZE[1],
        "annotations": annotations,
    }


def _from_zero(box: list[float]) -> list[float]:
    """A box counted from 1 as one counted from 0; no box, all zeros, stays as it is."""
    return [box[0] - 1, box[1] - 1, *box[2:]] if any(box) else box
