"""A small data set written in the three forms of CityPersons."""

import json

import numpy as np
import scipy.io
from PIL import Image

LABEL_NAMES = [
    "ignore",
    "pedestrian",
    "rider",
    "sitting person",
    "person (other)",
    "person group",
]

# Image -> rows (class, bbox, visible box). Not in the order of the names, as on a file system.
SCENES = {
    "ulm_000002_000019": [
        # 300 x 300 and its square root do not fit into 16 bits.
        (1, [100, 200, 300, 300], [100, 200, 300, 150]),
        (0, [500, 400, 60, 30], [500, 400, 60, 30]),
        (5, [600, 400, 200, 80], [0, 0, 0, 0]),
    ],
    "bonn_000000_000294": [],
    "aachen_000001_000019": [
        (1, [947, 406, 17, 40], [950, 407, 14, 39]),
        (2, [-12, 380, 40, 90], [0, 380, 28, 90]),
        (1, [2030, 380, 41, 100], [2030, 380, 18, 100]),
        (3, [1500, 500, 50, 70], [1500, 500, 50, 70]),
        (4, [1600, 500, 30, 70], [1600, 500, 30, 70]),
    ],
}


def write_citypersons(root, *forms, split="val", scenes=SCENES):
    """Write the images and the annotations of the given forms under ``root``; returns it."""
    for stem in scenes:
        image = root / "leftImg8bit" / split / stem.split("_")[0] / f"{stem}_leftImg8bit.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2048, 1024)).save(image, compress_level=1)
    writers = {"cityscapes": _write_cityscapes, "mat": _write_mat, "coco": _write_coco}
    for form in forms:
        writers[form](root, split, scenes)
    return root


def _write_cityscapes(root, split, scenes):
    for stem, rows in scenes.items():
        folder = root / "gtBboxCityPersons" / split / stem.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        objects = [
            {"label": LABEL_NAMES[label], "instanceId": 24000, "bbox": bbox, "bboxVis": vis}
            for label, bbox, vis in rows
        ]
        for row in objects:
            if row["label"] == "person group":  # here the visible box is the box
                row["bboxVis"] = row["bbox"]
        content = {"imgHeight": 1024, "imgWidth": 2048, "objects": objects}
        (folder / f"{stem}_gtBboxCityPersons.json").write_text(json.dumps(content))


def _write_mat(root, split, scenes):
    cells = np.empty((1, len(scenes)), dtype=object)
    for i, (stem, rows) in enumerate(scenes.items()):
        table = [[label, *bbox, 24000, *vis] for label, bbox, vis in rows]
        cells[0, i] = {
            "cityname": stem.split("_")[0],
            "im_name": f"{stem}_leftImg8bit.png",
            # The published files store whole numbers in 16 bits.
            "bbs": np.array(table, dtype=np.int16).reshape(-1, 10),
        }
    (root / "annotations").mkdir(exist_ok=True)
    variable = f"anno_{split}_aligned"
    scipy.io.savemat(root / "annotations" / f"anno_{split}.mat", {variable: cells})


def _write_coco(root, split, scenes):
    images, annotations = [], []
    for image_id, stem in enumerate(sorted(scenes), start=1):
        name = f"{stem}_leftImg8bit.png"
        images.append({"id": image_id, "im_name": name, "height": 1024, "width": 2048})
        for label, bbox, vis in scenes[stem]:
            ratio = vis[2] * vis[3] / (bbox[2] * bbox[3])
            row = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": 1,
                "iscrowd": int(label == 5),
                "ignore": int(label != 1),
                "bbox": bbox,
                "vis_bbox": vis,
                "height": bbox[3],
                "vis_ratio": float(f"{ratio:.12g}"),
            }
            annotations.append(row)
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3, 4, 5, 0)]
    content = {"categories": categories, "images": images, "annotations": annotations}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"{split}_gt.json").write_text(json.dumps(content))
