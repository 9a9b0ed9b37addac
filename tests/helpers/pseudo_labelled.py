"""Small labelled data sets and files of pseudo-labels."""

import json

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances
from PIL import Image

from hkd_d2.config import add_hkd_config
from hkd_d2.data.pseudo_labels import make_pseudo_labels

# Of the labelled images, and of those in a file; XYXY and XYWH.
LABELLED_BOX, POOL_BOX, POOL_BOX_XYWH = (
    [8, 4, 21, 52],
    [50.5, 3.25, 72.5, 57.25],
    [50.5, 3.25, 22, 54],
)


def write_images(folder, number):
    """Noise pictures of 64x96 pixels; returns records without annotations."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for i in range(1, number + 1):
        path = folder / f"{i:03}.png"
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(path)
        records.append({"file_name": str(path), "image_id": i, "height": 64, "width": 96})
    return records


def write_labelled(folder, number, name="pedestrian"):
    """A COCO data set of one class, a box an image; returns its two paths."""
    images = [
        {"id": r["image_id"], "file_name": r["file_name"], "height": 64, "width": 96}
        for r in write_images(folder / "images", number)
    ]
    rows = [
        {"id": i["id"], "image_id": i["id"], "category_id": 1, "bbox": LABELLED_BOX} for i in images
    ]
    content = {
        "images": images,
        "annotations": rows,
        "categories": [{"id": 1, "name": name}],
    }
    (folder / "labelled.json").write_text(json.dumps(content))
    return str(folder / "labelled.json"), str(folder / "images")


def pseudo_labels_of(records, classes=("pedestrian",), labels=(0,), sha256="0" * 64):
    """Pseudo-labels: a detection of each of ``labels`` in every image, by no detector."""
    found = Instances((64, 96))
    found.pred_boxes = Boxes(torch.tensor([POOL_BOX] * len(labels)).reshape(-1, 4))
    found.scores = torch.full((len(labels),), 0.75)
    found.pred_classes = torch.tensor(labels, dtype=torch.int64)
    info = {"teacher_sha256": sha256, "score_threshold": 0.4}
    return make_pseudo_labels(records, [found] * len(records), list(classes), info)


def semi_supervised_config(folder, labelled=4, pseudo=6):
    """Config of a run on a labelled set and a file written under ``folder``, with batches of 2."""
    cfg = get_cfg()
    add_hkd_config(cfg)
    name = f"labelled_{folder.name}"
    cfg.HKD.DATA.REGISTER = [[name, "coco", *write_labelled(folder / "labelled", labelled)]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    path = folder / "file.json"
    path.write_text(json.dumps(pseudo_labels_of(write_images(folder / "file", pseudo))))
    cfg.HKD.DATA.PSEUDO = [str(path)]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 96
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    return cfg
