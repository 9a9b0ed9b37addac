"""Detection files in the forms of the benchmarks, read into COCO's result format and written.

======================  =========================================================================
form                    content
======================  =========================================================================
COCO                    a JSON list of ``{"image_id", "category_id", "bbox", "score"}``
CityPersons submission  the same for the test set, ``image_id`` being the line of the image in the
                        benchmark's ``test_imgids.txt``, from 1
Caltech                 a folder with ``setSS/VVVV.txt`` a video; a line is frame, x, y, w, h,
                        score, parted by commas or blanks, frames counted from 1
Caltech's dt-NAME.mat   what dbEval keeps: a cell a frame, of rows x, y, w, h, score
KAIST                   a text file; a line is image number, x, y, w, h, score, images counted from
                        1 in the order of their ids
CrowdHuman              odgt, a JSON object a line and image: ``ID``, ``height``, ``width`` and
                        ``dtboxes``, each with ``box`` [x, y, w, h], ``score`` and ``tag`` 1
======================  =========================================================================

Caltech's files count pixels from 1, as its annotations do, and all others from 0, as ground truth
and detections here: x and y are shifted by 1 there. Images are found by the stem of
their ``file_name`` or ``im_name``: Caltech's is ``set06_V000_I00029``, frames counted from 0, and
CrowdHuman's is the ID. A bad row (a number that is not finite, a negative size, an image that the
ground truth lacks, another category than 1) is refused with file and row.
"""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hkd_d2.data.annotation_rules import is_finite
from hkd_d2.data.text_files import parse_json, read_json, read_text, shown
from hkd_d2.evaluation.coco_rows import (
    PEDESTRIAN,
    check_box,
    check_detections,
    load_detections,
)
from hkd_d2.evaluation.ground_truth_files import read_mat_cells
from hkd_d2.evaluation.protocols import CITYPERSONS, CrowdHumanProtocol, Protocol
from hkd_d2.files import write_text

__all__ = [
    "read_caltech",
    "read_caltech_mat",
    "read_citypersons_submission",
    "read_coco",
    "read_crowdhuman",
    "read_kaist",
    "read_results",
    "write_caltech",
    "write_citypersons_submission",
    "write_coco",
    "write_crowdhuman",
]

GroundTruth = Mapping[str, Any]
Detections = list[dict[str, Any]]


def read_results(
    path: str | os.PathLike,
    ground_truth: GroundTruth,
    protocol: Protocol | CrowdHumanProtocol | str = CITYPERSONS,
) -> Detections:
    """Read a file in the form that its name tells.

    A folder or .mat is Caltech's, .odgt CrowdHuman's and .txt KAIST's. Any other is COCO's, in
    which rows of other categories are left to the evaluation, as
    :func:`hkd_d2.evaluation.load_detections` does.

    Raises:
        FileNotFoundError, ValueError: as the function of that form.
    """
    if os.path.isdir(path):
        return read_caltech(path, ground_truth)
    ending = Path(path).suffix.lower()
    if ending == ".odgt":
        return read_crowdhuman(path, ground_truth)
    if ending == ".txt":
        return read_kaist(path, ground_truth)
    if ending == ".mat":
        return read_caltech_mat(path, ground_truth)
    return load_detections(path, ground_truth, protocol)


# ------------------------------------------------------------------------------------- COCO's


def read_coco(path: str | os.PathLike, ground_truth: GroundTruth) -> Detections:
    """Read COCO results, all of category 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a bad row, with file and row.
    """
    detections = read_json(path)
    _check(detections, ground_truth, str(path))
    return detections


def write_coco(path: str | os.PathLike, detections: Detections, ground_truth: GroundTruth) -> None:
    """Write COCO results.

    Raises:
        ValueError: a bad row, with file and row; nothing is written.
    """
    _check(detections, ground_truth, str(path))
    rows = [
        {
            "image_id": int(row["image_id"]),
            "category_id": PEDESTRIAN,
            "bbox": [float(value) for value in row["bbox"]],
            "score": float(row["score"]),
        }
        for row in detections
    ]
    write_text(path, json.dumps(rows, allow_nan=False))


def _check(detections: Detections, ground_truth: GroundTruth, source: str) -> None:
    check_detections(detections, _bare(ground_truth), source)
    for number, row in enumerate(detections):
        if row["category_id"] != PEDESTRIAN:
            raise ValueError(
                f"{source}: detection {number} has category_id {shown(row['category_id'])}; keep "
                f"pedestrians alone, category {PEDESTRIAN}."
            )


def _bare(ground_truth: GroundTruth) -> GroundTruth:
    """The images, which rows are checked against; the annotations are another matter."""
    images = [{"id": image["id"]} for image in ground_truth["images"]]
    return {"images": images, "categories": [], "annotations": []}


# ---------------------------------------------------------------------- CityPersons submissions


def read_citypersons_submission(
    path: str | os.PathLike, test_imgids: str | os.PathLike, ground_truth: GroundTruth
) -> Detections:
    """Read a submission; ``image_id`` becomes that of the ground truth.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a bad row, or images and list that do not fit.
    """
    image_ids = dict(enumerate(_submission_order(test_imgids, ground_truth), 1))
    listed = {"images": [{"id": line} for line in image_ids]}
    detections = read_coco(path, listed)
    return [row | {"image_id": image_ids[row["image_id"]]} for row in detections]


def write_citypersons_submission(
    path: str | os.PathLike,
    detections: Detections,
    test_imgids: str | os.PathLike,
    ground_truth: GroundTruth,
) -> None:
    """Write a submission, in the order of the benchmark's list.

    Raises:
        FileNotFoundError: the list is missing.
        ValueError: a bad row, or images and list that do not fit.
    """
    order = _submission_order(test_imgids, ground_truth)
    _check(detections, ground_truth, str(path))
    line = {image_id: number for number, image_id in enumerate(order, 1)}
    rows = [row | {"image_id": line[row["image_id"]]} for row in detections]
    rows.sort(key=lambda row: row["image_id"])
    write_coco(path, rows, {"images": [{"id": number} for number in line.values()]})


def _submission_order(test_imgids: str | os.PathLike, ground_truth: GroundTruth) -> list[int]:
    """The ids of the images in the order of the list."""
    if not os.path.isfile(test_imgids):
        raise FileNotFoundError(
            f"{test_imgids} does not exist; give the benchmark's list of images."
        )
    by_frame = {_frame(_stem(image)): image["id"] for image in ground_truth["images"]}
    order = []
    for number, line in enumerate(filter(str.strip, _read_lines(test_imgids)), 1):
        frame = _frame(Path(line.strip()).stem)
        if frame not in by_frame:
            raise ValueError(
                f"{test_imgids}: line {number} names {shown(line.strip())}, which the ground "
                "truth's images lack; use all images of the test set."
            )
        order.append(by_frame[frame])
    if len(set(order)) < len(by_frame) or len(order) > len(by_frame):
        raise ValueError(
            f"{test_imgids} lists {len(order)} images, the ground truth {len(by_frame)}; use the "
            "list and the images of the same set."
        )
    return order


def _frame(stem: str) -> tuple | str:
    """City, sequence and frame: berlin00000_000019_img and berlin_000000_000019_leftImg8bit."""
    match = re.match(r"([a-z-]+)_?(\d+)_(\d+)", stem)
    return (match[1], int(match[2]), int(match[3])) if match else stem


# ---------------------------------------------------------------------------------- Caltech's


def read_caltech(folder: str | os.PathLike, ground_truth: GroundTruth) -> Detections:
    """Read Caltech's text files; every video of the ground truth has one, which may be empty.

    Raises:
        FileNotFoundError: a video's file is missing.
        ValueError: a bad row, with file and line, or an image that is not named as Caltech's.
    """
    detections = []
    for (part, video), frames in _videos(ground_truth).items():
        path = Path(folder, part, f"{video}.txt")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; write a file for each video.")
        for number, line in enumerate(_read_lines(path), 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                frame, x, y, w, h, score = map(float, line.replace(",", " ").split())
            except ValueError:
                raise ValueError(
                    f"{where} is {shown(line)}; give frame, x, y, w, h, score."
                ) from None
            box = [x - 1, y - 1, w, h]
            check_box(box, where)
            if not math.isfinite(score):
                raise ValueError(f"{where} has score {score!r}; make it a finite number.")
            if frame - 1 not in frames:
                raise ValueError(
                    f"{where} is of frame {frame:g} (from 1), which the ground truth lacks; detect "
                    "on the evaluated images only."
                )
            detections.append(_detection(frames[frame - 1], box, score))
    return detections


def write_caltech(
    folder: str | os.PathLike, detections: Detections, ground_truth: GroundTruth
) -> None:
    """Write a text file for each video of the ground truth.

    Raises:
        ValueError: a bad row, or an image that is not named as Caltech's; nothing is written.
    """
    videos = _videos(ground_truth)
    _check(detections, ground_truth, str(folder))
    by_image = _by_image(detections)
    for (part, video), frames in videos.items():
        path = Path(folder, part, f"{video}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            ",".join([str(frame + 1), *map(repr, map(float, (x + 1, y + 1, w, h, row["score"])))])
            for frame in sorted(frames)
            for row in by_image[frames[frame]]
            for x, y, w, h in [row["bbox"]]
        ]
        write_text(path, "".join(line + "\n" for line in lines))


def _videos(ground_truth: GroundTruth) -> dict[tuple[str, str], dict[int, int]]:
    """Image ids by frame, counted from 0, of each (set, video)."""
    videos = defaultdict(dict)
    for row, image in enumerate(ground_truth["images"]):
        match = re.fullmatch(r"(set\d\d)_(V\d\d\d)_I(\d+)", _stem(image))
        if not match:
            raise ValueError(
                f"images[{row}] of the ground truth is named {shown(_stem(image))}; for Caltech's "
                "text files give names as set06_V000_I00029."
            )
        videos[match[1], match[2]][int(match[3])] = image["id"]
    return videos


def read_caltech_mat(path: str | os.PathLike, ground_truth: GroundTruth) -> Detections:
    """Read the detections that dbEval keeps, a cell a frame in the order of the images' ids.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: SciPy is missing.
        ValueError: another content, or another number of frames than the ground truth's.
    """
    cells = read_mat_cells(path, "dt")
    image_ids = sorted(image["id"] for image in ground_truth["images"])
    if len(cells) != len(image_ids):
        raise ValueError(
            f"{path} has {len(cells)} frames, the ground truth {len(image_ids)}; use files of the "
            "same set."
        )
    detections = [
        _detection(image_id, [x - 1, y - 1, w, h], score)
        for image_id, rows in zip(image_ids, cells, strict=True)
        for x, y, w, h, score in rows.tolist()
    ]
    check_detections(detections, _bare(ground_truth), str(path))
    return detections


# ------------------------------------------------------------------------------------- KAIST's


def read_kaist(path: str | os.PathLike, ground_truth: GroundTruth) -> Detections:
    """Read KAIST's text file of detections.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a bad row, with file and line.
    """
    image_ids = sorted(image["id"] for image in ground_truth["images"])
    detections = []
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            image, x, y, w, h, score = map(float, line.replace(",", " ").split())
        except ValueError:
            raise ValueError(f"{where} is {shown(line)}; give image, x, y, w, h, score.") from None
        box = [x, y, w, h]
        check_box(box, where)
        if not math.isfinite(score):
            raise ValueError(f"{where} has score {score!r}; make it a finite number.")
        if image not in range(1, len(image_ids) + 1):
            raise ValueError(
                f"{where} is of image {image:g} (from 1), and the ground truth has "
                f"{len(image_ids)}; detect on the evaluated images only."
            )
        detections.append(_detection(image_ids[int(image) - 1], box, score))
    return detections


# ------------------------------------------------------------------------------- CrowdHuman's


def read_crowdhuman(path: str | os.PathLike, ground_truth: GroundTruth) -> Detections:
    """Read CrowdHuman's odgt of detections.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a bad row, with file, line and number of the box.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist; give the path of an odgt file.")
    image_ids = {_stem(image): image["id"] for image in ground_truth["images"]}
    detections, seen = [], set()
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        content = parse_json(line, where)
        name = content.get("ID") if isinstance(content, dict) else None
        if not isinstance(name, str) or not isinstance(content.get("dtboxes"), list):
            raise ValueError(f"{where} has no text 'ID' and list 'dtboxes'; export it again.")
        if name not in image_ids:
            raise ValueError(
                f"{where} is of image {shown(name)}, which the ground truth lacks; detect on the "
                "evaluated images only."
            )
        if name in seen:
            raise ValueError(
                f"{where}: the image {shown(name)} stands twice; write one line an image."
            )
        seen.add(name)
        for box_number, row in enumerate(content["dtboxes"]):
            inner = f"{where}: dtboxes[{box_number}]"
            if not isinstance(row, dict) or not {"box", "score"} <= row.keys():
                raise ValueError(f"{inner} is {shown(row)}; make it an object with box and score.")
            check_box(row["box"], inner)
            if not is_finite(row["score"]):
                score = shown(row["score"])
                raise ValueError(f"{inner} has score {score}; make it a finite number.")
            if row.get("tag", PEDESTRIAN) != PEDESTRIAN:
                raise ValueError(f"{inner} has tag {shown(row['tag'])}; keep persons alone, tag 1.")
            detections.append(_detection(image_ids[name], row["box"], row["score"]))
    if not seen:
        raise ValueError(f"{path} is empty; write a line for each image.")
    return detections


def write_crowdhuman(
    path: str | os.PathLike, detections: Detections, ground_truth: GroundTruth
) -> None:
    """Write CrowdHuman's odgt: a line for each image, also those without a detection.

    Raises:
        ValueError: a bad row, or an image without width and height; nothing is written.
    """
    _check(detections, ground_truth, str(path))
    by_image = _by_image(detections)
    lines = []
    for row, image in enumerate(ground_truth["images"]):
        if "width" not in image or "height" not in image:
            raise ValueError(f"images[{row}] of the ground truth lacks width or height; add it.")
        boxes = [
            {
                "box": [float(value) for value in found["bbox"]],
                "score": float(found["score"]),
                "tag": PEDESTRIAN,
            }
            for found in by_image[image["id"]]
        ]
        size = {"height": image["height"], "width": image["width"]}
        lines.append(json.dumps({"ID": _stem(image), **size, "dtboxes": boxes}))
    write_text(path, "".join(line + "\n" for line in lines))


# --------------------------------------------------------------------------------------- shared


def _read_lines(path: str | os.PathLike) -> list[str]:
    return read_text(path).split("\n")


def _detection(image_id: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": PEDESTRIAN, "bbox": list(box), "score": score}


def _by_image(detections: Detections) -> dict[int, Detections]:
    by_image = defaultdict(list)
    for row in detections:
        by_image[row["image_id"]].append(row)
    return by_image


def _stem(image: Mapping[str, Any]) -> str:
    name = image.get("file_name", image.get("im_name"))
    if not isinstance(name, str):
        raise ValueError(f"Image {image['id']} has no file_name or im_name; add it.")
    name = os.path.basename(name)
    return name[: name.rindex(".")] if "." in name else name
