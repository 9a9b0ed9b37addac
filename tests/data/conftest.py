"""A small data set written in the three forms of CityPersons, and the tools on data sets."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from helpers.published_data import published_data

TOOLS = Path(__file__).resolve().parents[2] / "tools"

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


@pytest.fixture
def scenes():
    return SCENES


@pytest.fixture
def write_citypersons(tmp_path):
    """A function that writes SCENES under a new root in the given forms and returns the root."""

    def write(*forms, split="val", scenes=SCENES):
        root = tmp_path / "citypersons"
        for stem in scenes:
            image = root / "leftImg8bit" / split / stem.split("_")[0] / f"{stem}_leftImg8bit.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2048, 1024)).save(image, compress_level=1)
        writers = {"cityscapes": _write_cityscapes, "mat": _write_mat, "coco": _write_coco}
        for form in forms:
            writers[form](root, split, scenes)
        return root

    return write


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    """A cache of the test's own."""
    monkeypatch.setenv("HKD_D2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def visualize():
    """main of tools/visualize_data.py; the data sets that it registers are forgotten afterwards."""
    before = set(DatasetCatalog.list())
    yield runpy.run_path(str(TOOLS / "visualize_data.py"))["main"]
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def draw(visualize, tmp_path, capsys):
    """A function that draws a split of a format and returns the legend's counts by role."""

    def draw_split(form, root, split):
        out = tmp_path / f"{form}_{split}.png"
        assert visualize([form, str(root), split, "--out", str(out)]) == 0, capsys.readouterr().err
        with Image.open(out) as image:
            assert image.format == "PNG"
        words = capsys.readouterr().out.strip().split(": ")[-1]
        return {role: int(count) for role, count in (w.rsplit(" ", 1) for w in words.split(", "))}

    return draw_split


@pytest.fixture(scope="session")
def shared_data():
    """The folder with the real files; skips where it is absent."""
    return published_data()


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
