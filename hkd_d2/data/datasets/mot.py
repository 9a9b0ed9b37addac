"""Ground truth of the MOTChallenge benchmarks as detection data, for MOT17 and MOT20.

Under one root folder (``MOT17`` or ``MOT20`` as published)::

    train/<sequence>/seqinfo.ini
    train/<sequence>/gt/gt.txt     frame, track, x, y, w, h, flag, class, visibility; a row a line
    train/<sequence>/img1/000001.jpg, ...

Pixels and frames are counted from 1. The classes, and which of them are distractors, are those of
TrackEval (github.com/JonathonLuiten/TrackEval, datasets/mot_challenge_2d_box.py).
"""

import configparser
import os

from hkd_d2.data.cache import cached_records
from hkd_d2.data.datasets.records import check_images_exist, check_split, make_annotation
from hkd_d2.data.text_files import read_lines, read_text, shown

# The ground truth of test is not public. The halves are those of CenterTrack
# (github.com/xingyizhou/CenterTrack, convert_mot_to_coco.py): the first N // 2 + 1 of the N frames
# of a sequence train.
SPLITS = ("train", "train_half", "val_half")

PEDESTRIAN, CROWD = 1, 13
CLASSES = frozenset(range(1, 14))
MAX_FRAMES = 999_999  # of a sequence: an image's name has six digits


def load_mot(
    name: str, root: str, split: str, distractors: set[int], *, check_images: bool = True
) -> list[dict]:
    """Load a benchmark.

    A pedestrian of flag 1 counts; one of flag 0, or outside the frame, is ``ignore``, as are the
    ``distractors``, at which the benchmark does not count detections, and crowds (``iscrowd``).
    Other classes, vehicles and occluders, are no persons and left out, after the same checks.

    Args:
        name: of the benchmark, for messages.
        root: folder with ``train``.
        split: one of :data:`SPLITS`.
        distractors: class ids.
        check_images: check that every image file exists.

    Returns:
        list[dict]: records (see :mod:`hkd_d2.data.datasets.records`), a frame each, in the order of
        sequence and frame. The ids 1, 2, ... are counted over the whole of train, in the halves
        too. ``label`` is the file's class.

    Raises:
        FileNotFoundError: a folder, a file or an image is missing.
        ValueError: an unknown split, or a damaged file; the message names file and line.
    """
    root = check_split(name, SPLITS, root, split)
    folders = _sequences(os.path.join(root, "train"))
    records = cached_records(
        f"{name.lower()}-{split}",
        root,
        [path for folder in folders for path in (_info_path(folder), _rows_path(folder))],
        lambda: _read_sequences(folders, split, distractors),
    )
    if check_images:
        # The sequence is that of the image which the message names.
        check_images_exist(records, _info_path(os.path.join(root, "train", "*")))
    return records


def _read_sequences(folders: list[str], split: str, distractors: set[int]) -> list[dict]:
    """Records of the frames that ``split`` has of each sequence."""
    records, image_id = [], 0
    for folder in folders:
        images, suffix, size, length = _read_info(_info_path(folder))
        rows = _read_rows(_rows_path(folder), length, size, distractors)
        half = length // 2 + 1
        first, last = {"train_half": (1, half), "val_half": (half + 1, length)}.get(
            split, (1, length)
        )
        for frame in range(first, last + 1):
            records.append(
                {
                    "file_name": os.path.join(folder, images, f"{frame:06d}{suffix}"),
                    "image_id": image_id + frame,
                    "height": size[0],
                    "width": size[1],
                    "annotations": rows[frame - 1],
                }
            )
        image_id += length
    return records


def _sequences(folder: str) -> list[str]:
    """Folders of the sequences.

    MOT17 has each three times, with the detections of DPM, FRCNN and SDP, but the same frames and
    ground truth: one of them is taken, FRCNN where it is there.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if os.path.isfile(_info_path(os.path.join(folder, name)))]
    if not names:
        raise FileNotFoundError(
            f"{folder}: no sequence with a seqinfo.ini; the root must be the folder that has train."
        )
    chosen = {}
    for name in sorted(names, key=lambda name: (not name.endswith("-FRCNN"), name)):
        chosen.setdefault("-".join(name.split("-")[:2]), name)
    return [os.path.join(folder, chosen[key]) for key in sorted(chosen)]


def _info_path(folder: str) -> str:
    return os.path.join(folder, "seqinfo.ini")


def _rows_path(folder: str) -> str:
    return os.path.join(folder, "gt", "gt.txt")


def _read_info(path: str) -> tuple[str, str, tuple[int, int], int]:
    """Image folder, suffix, (height, width) and number of frames of a sequence."""
    text = read_text(path, "fetch it again.")
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read_string(text)
        info = config["Sequence"]
        height, width, length = (info.getint(key) for key in ("imHeight", "imWidth", "seqLength"))
        if min(height, width, length) <= 0 or length > MAX_FRAMES:
            raise ValueError
        return info["imDir"], info["imExt"], (height, width), length
    except (configparser.Error, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: [Sequence] with imDir, imExt and the positive whole numbers imHeight, "
            f"imWidth and seqLength (up to {MAX_FRAMES}) is expected; fetch it again."
        ) from None


def _read_rows(
    path: str, length: int, size: tuple[int, int], distractors: set[int]
) -> list[list[dict]]:
    """The rows of each frame."""
    frames: list[list[dict]] = [[] for _ in range(length)]
    ignored = {*distractors, CROWD}
    lines = read_lines(path, "unpack the ground truth there.")
    if not lines:
        raise ValueError(f"{path}: the file is empty; fetch it again.")
    for i, line in enumerate(lines, start=1):
        where = f"{path}: line {i}"
        try:
            frame, _, x, y, w, h, flag, label, visibility = (float(v) for v in line.split(","))
            if int(frame) != frame or not 1 <= frame <= length:
                raise ValueError
            if flag not in (0, 1) or label not in CLASSES:
                raise ValueError
        except (ValueError, OverflowError):
            raise ValueError(
                f"{where}: 'frame,track,x,y,w,h,flag,class,visibility' is expected, with a frame "
                f"up to {length}, a flag 0 or 1 and a class 1 to 13, not {shown(line)}; if "
                "the file ends there, it is truncated."
            ) from None
        x, y = x - 1, y - 1
        outside = x >= size[1] or y >= size[0] or x + w <= 0 or y + h <= 0
        annotation = make_annotation(
            [x, y, w, h],
            where=where,
            image_size=size,
            # Tracks go on where a person has left the frame.
            ignore=label != PEDESTRIAN or flag == 0 or outside,
            iscrowd=label == CROWD,
            vis_ratio=visibility,
        )
        if label == PEDESTRIAN or label in ignored:
            frames[int(frame) - 1].append({**annotation, "label": int(label)})
    return frames
