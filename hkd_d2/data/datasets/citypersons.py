"""CityPersons, in whichever of its three forms is on disk.

Under one root folder::

    leftImg8bit/{split}/<city>/<stem>_leftImg8bit.png                    the images
    gtBboxCityPersons/{split}/<city>/<stem>_gtBboxCityPersons.json       (a) Cityscapes distribution
    annotations/anno_{split}.mat                                         (b) MATLAB
    annotations/{split}_gt.json                                          (c) COCO JSON

The first form found, in this order, is read. The three hold the same rows and give the same
records, but that (c) does not tell the class of a row other than pedestrian or group, so that its
records have no ``label``. Images are in the order of their file names, which is the order of the
.mat files and of the official evaluation file, with ids 1, 2, ...; form (c) has its own order and
ids (the same in the official file).

Zhang, Benenson, Schiele: CityPersons: A Diverse Dataset for Pedestrian Detection, CVPR 2017.
"""

import glob
import logging
import os

from hkd_d2.data.cache import cached_records
from hkd_d2.data.datasets import coco
from hkd_d2.data.datasets.formats import folder_format
from hkd_d2.data.datasets.records import (
    check_images_exist,
    image_size_of,
    make_annotation,
    visible_ratio,
)
from hkd_d2.data.mat_files import read_mat
from hkd_d2.data.text_files import read_json, shown

SPLITS = ("train", "val")
FORMS = ("cityscapes", "mat", "coco")  # in the order of preference

# Class ids of the .mat files under the names of the JSON files (cityscapesScripts,
# helpers/labels_cityPersons.py).
LABELS = {
    "ignore": 0,
    "pedestrian": 1,
    "rider": 2,
    "sitting person": 3,
    "person (other)": 4,
    "person group": 5,
}
PEDESTRIAN, GROUP = 1, 5
# Of the JSON files' names in the Cityscapes distribution.
SUFFIX = "_gtBboxCityPersons.json"

# Counted in the published .mat files; positives are pedestrians of at least 50 pixels.
PUBLISHED = {
    "train": {"images": 2975, "rows": 27770, "pedestrians": 16526, "positives": 12670},
    "val": {"images": 500, "rows": 5795, "pedestrians": 3157, "positives": 2549},
}

# Every Cityscapes image has this (height, width); the .mat files do not state it.
IMAGE_SIZE = (1024, 2048)

logger = logging.getLogger(__name__)


def annotation_path(root: str, split: str, form: str) -> str:
    """Folder (form "cityscapes") or file ("mat", "coco") with the annotations of ``split``."""
    return {
        "cityscapes": os.path.join(root, "gtBboxCityPersons", split),
        "mat": os.path.join(root, "annotations", f"anno_{split}.mat"),
        "coco": os.path.join(root, "annotations", f"{split}_gt.json"),
    }[form]


@folder_format("citypersons", SPLITS)
def load_citypersons(
    root: str, split: str, *, form: str | None = None, check_images: bool = True
) -> list[dict]:
    """Load CityPersons or a data set in one of its forms (see the module's docstring).

    A row is ``ignore`` by the file's own rule, which is any class but pedestrian; a group is
    ``iscrowd`` too. Groups have no visible box of their own: it is [0, 0, 0, 0] and their
    ``vis_ratio`` 0, as in the .mat and the official evaluation files.

    Args:
        root: folder of the data set.
        split: "train" or "val" (the annotations of "test" are not public).
        form: "cityscapes", "mat" or "coco"; None takes the first one found in this order.
        check_images: check that every image file exists.

    Returns:
        list[dict]: records (see :mod:`hkd_d2.data.datasets.records`), images without rows included.

    Raises:
        FileNotFoundError: a folder, an annotation file or an image is missing.
        ValueError: an unknown split or form, or a file that is damaged or of another form; the
            message names file and row.
    """
    if split not in SPLITS:
        raise ValueError(
            f"CityPersons has annotations for the splits train and val, not '{split}'."
        )
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"{root}: no such folder; put CityPersons there or set DETECTRON2_DATASETS or "
            "HKD.DATA.REGISTER to where it is."
        )
    if form not in (None, *FORMS):
        raise ValueError(f"CityPersons has the forms {', '.join(FORMS)}, not '{form}'.")
    found = [f for f in FORMS if os.path.exists(annotation_path(root, split, f))]
    if form is None and not found:
        paths = ", ".join(annotation_path(root, split, f) for f in FORMS)
        raise FileNotFoundError(
            f"{root}: no annotations of split '{split}'; one of {paths} is needed."
        )
    form = form or found[0]
    root = os.path.abspath(root)
    source = annotation_path(root, split, form)
    records = cached_records(
        f"citypersons-{split}-{form}",
        root,
        _annotation_files(source) if form == "cityscapes" else [source],
        lambda: _READERS[form](root, split),
    )
    if form == "cityscapes":
        _warn_of_unlabelled_images(root, split, records)
    if check_images:
        check_images_exist(records, source)
    others = ", ".join(f for f in found if f != form) or "none"
    logger.info(
        f"CityPersons {split}: {len(records)} images from {source} (other forms there: {others})"
    )
    return records


def to_coco(records: list[dict]) -> dict:
    """CityPersons records as the content of an official evaluation file (val_gt.json).

    All rows have category_id 1 and are told apart by ``ignore``; ids are 1, 2, ... in row order;
    images are named by ``im_name`` without a folder; ``vis_ratio`` has twelve significant digits.
    """
    content = coco.to_coco(records, ".")
    names = (
        "ignore region",
        "pedestrian",
        "rider",
        "sitting person",
        "other person",
        "people group",
    )
    content["categories"] = [{"id": i, "name": names[i]} for i in (1, 2, 3, 4, 5, 0)]
    for image in content["images"]:
        image["im_name"] = os.path.basename(image.pop("file_name"))
    return content


def _read_cityscapes(root: str, split: str) -> list[dict]:
    files = _annotation_files(annotation_path(root, split, "cityscapes"))
    records = []
    for image_id, path in enumerate(files, start=1):
        data = read_json(path)
        if not isinstance(data, dict):
            data = {}
        objects = data.get("objects")
        if not isinstance(objects, list):
            raise ValueError(f"{path}: no CityPersons annotation file; objects must be a list.")
        height, width = image_size_of(data, ("imgHeight", "imgWidth"), path)
        city = os.path.basename(os.path.dirname(path))
        image = os.path.basename(path).removesuffix(SUFFIX) + "_leftImg8bit.png"
        annotations = []
        for i, row in enumerate(objects):
            where = f"{path}: objects[{i}]"
            try:
                name, bbox, vis_bbox = (row[key] for key in ("label", "bbox", "bboxVis"))
            except (KeyError, TypeError):
                raise ValueError(f"{where}: label, bbox or bboxVis is missing.") from None
            if name not in LABELS:
                raise ValueError(
                    f"{where}: unknown label {shown(name)}, known are {', '.join(LABELS)}."
                )
            annotations.append(_annotation(LABELS[name], bbox, vis_bbox, where, (height, width)))
        records.append(_record(root, split, city, image, image_id, (height, width), annotations))
    return records


def _annotation_files(folder: str) -> list[str]:
    """The JSON files of a split in the Cityscapes distribution, in the order of its records."""
    files = glob.glob(os.path.join(glob.escape(folder), "*", "*" + SUFFIX))
    if not files:
        raise FileNotFoundError(
            f"{folder}: no file <city>/*{SUFFIX}; unpack the annotations there."
        )
    return sorted(files, key=os.path.basename)


def _warn_of_unlabelled_images(root: str, split: str, records: list[dict]) -> None:
    images = glob.glob(_image_path(glob.escape(root), split, "*", "*_leftImg8bit.png"))
    unlabelled = sorted(set(images) - {r["file_name"] for r in records})
    if unlabelled:
        logger.warning(
            f"{annotation_path(root, split, 'cityscapes')}: {len(unlabelled)} images have no "
            f"annotation file and are left out, the first is {unlabelled[0]}"
        )


def _read_mat(root: str, split: str) -> list[dict]:
    path = annotation_path(root, split, "mat")
    variable = f"anno_{split}_aligned"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; check the path.")
    try:
        cells = read_mat(path, variable)
        # tolist gives Python's numbers: the file stores each image's rows in the smallest integer
        # type that holds them, in which the area of a box overflows.
        images = [
            (
                str(cell["cityname"][0, 0][0]),
                str(cell["im_name"][0, 0][0]),
                cell["bbs"][0, 0].tolist(),
            )
            for cell in cells.ravel()
        ]
    except Exception as error:  # scipy raises a dozen types on a damaged file
        raise ValueError(
            f"{path}: not CityPersons' MATLAB file, {variable} with cityname, im_name and bbs "
            f"could not be read ({type(error).__name__}: {error}); fetch it again."
        ) from error
    if not images:
        raise ValueError(f"{path}: {variable} holds no image; fetch it again.")

    records = []
    for image_id, (city, image, rows) in enumerate(sorted(images, key=lambda x: x[1]), start=1):
        annotations = []
        for i, row in enumerate(rows):
            where = f"{path}: {image} row {i + 1}"
            if len(row) != 10 or row[0] not in LABELS.values():
                raise ValueError(
                    f"{where}: ten numbers are expected (class 0 to 5, x, y, w, h, instance id, "
                    f"visible x, y, w, h), not {row}."
                )
            annotations.append(_annotation(int(row[0]), row[1:5], row[6:10], where, IMAGE_SIZE))
        records.append(_record(root, split, city, image, image_id, IMAGE_SIZE, annotations))
    return records


def _read_coco(root: str, split: str) -> list[dict]:
    path = annotation_path(root, split, "coco")
    records = coco.load_coco(path, "", check_images=False)
    for record in records:
        # Files name images with or without a folder; the name itself starts with the city.
        name = os.path.basename(record["file_name"])
        record["file_name"] = _image_path(root, split, name.split("_")[0], name)
        for row in record["annotations"]:
            if row["category_id"] != 0:
                raise ValueError(
                    f"{path}: CityPersons has one class, but categories other than 1 occur."
                )
            if "vis_bbox" in row:  # the file's ratio is rounded
                row["vis_ratio"] = visible_ratio(row["bbox"], row["vis_bbox"])
    return records


_READERS = {"cityscapes": _read_cityscapes, "mat": _read_mat, "coco": _read_coco}


def _image_path(root: str, split: str, city: str, name: str) -> str:
    return os.path.join(root, "leftImg8bit", split, city, name)


def _record(root, split, city, image, image_id, size, annotations) -> dict:
    return {
        "file_name": _image_path(root, split, city, image),
        "image_id": image_id,
        "height": size[0],
        "width": size[1],
        "annotations": annotations,
    }


def _annotation(label: int, bbox, vis_bbox, where: str, size: tuple[int, int]) -> dict:
    annotation = make_annotation(
        bbox,
        where=where,
        image_size=size,
        ignore=label != PEDESTRIAN,
        iscrowd=label == GROUP,
        vis_bbox=[0, 0, 0, 0] if label == GROUP else vis_bbox,
    )
    return {**annotation, "label": label}
