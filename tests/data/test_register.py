import gc
import json
import os
from types import SimpleNamespace

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from hkd_d2.config import add_hkd_config
from hkd_d2.data.datasets import (
    check_records,
    register,
    register_builtin_datasets,
    register_datasets,
)


@pytest.fixture
def config():
    """A function that makes a config with these entries; the names are forgotten afterwards."""
    before = set(DatasetCatalog.list())

    def make(*entries):
        cfg = get_cfg()
        add_hkd_config(cfg)
        cfg.HKD.DATA.REGISTER = list(entries)
        return cfg

    yield make
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def coco_file(tmp_path):
    (tmp_path / "1.png").touch()
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 10, "width": 10}],
        "annotations": [],
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(content))
    return tmp_path / "gt.json"


def test_builtin_names(monkeypatch):
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"citypersons_{split}")
        assert metadata.thing_classes == ["pedestrian"]
        assert metadata.evaluator_type == "pedestrian"
    # Detectron2's default folder, or that of the environment when the package was imported.
    root = os.path.abspath(
        os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "citypersons")
    )
    assert MetadataCatalog.get("citypersons_val").hkd_entry == ("citypersons", root, "val")
    register_builtin_datasets()  # again
    monkeypatch.setenv("DETECTRON2_DATASETS", "/elsewhere")
    with pytest.raises(ValueError, match="'caltech_train' already stands for"):
        register_builtin_datasets()


def test_citypersons_entry(config, write_citypersons):
    root = write_citypersons("mat", split="train")
    cfg = config(["streets", "citypersons", str(root), "train"])
    register_datasets(cfg)
    register_datasets(cfg)  # the same entry again
    assert len(check_records("streets")) == 3
    assert MetadataCatalog.get("streets").thing_classes == ["pedestrian"]
    assert MetadataCatalog.get("streets").evaluator_type == "pedestrian"


def test_coco_entry_relative_to_the_working_directory(config, coco_file, monkeypatch):
    monkeypatch.chdir(coco_file.parent)
    register_datasets(config(["frames", "coco", "gt.json", "."]))
    monkeypatch.chdir("/")
    records = check_records("frames")
    assert [r["file_name"] for r in records] == [str(coco_file.parent / "1.png")]
    metadata = MetadataCatalog.get("frames")
    assert metadata.thing_classes == ["person"]
    assert metadata.evaluator_type == "pedestrian"
    assert metadata.json_file == str(coco_file)
    assert check_records("frames") == records  # metadata may be set again


def test_same_name_other_content(config, coco_file):
    register_datasets(config(["frames", "coco", str(coco_file), "a"]))
    with pytest.raises(ValueError, match="the name 'frames' already stands for .*choose another"):
        register_datasets(config(["frames", "coco", str(coco_file), "b"]))
    with pytest.raises(
        ValueError, match="the name 'coco_2017_val' already stands for another data"
    ):
        register_datasets(config(["coco_2017_val", "coco", str(coco_file), "b"]))


def test_the_collector_rests_while_rows_are_made(config, monkeypatch):
    seen = []

    def load(root, split):
        seen.append(gc.isenabled())
        if split == "val":
            raise ValueError("damaged")
        return []

    monkeypatch.setitem(register.FOLDERS, "citypersons", (("train", "val"), load))
    register_datasets(config(["a", "citypersons", "/", "train"], ["b", "citypersons", "/", "val"]))
    assert gc.isenabled() and DatasetCatalog.get("a") == [] and gc.isenabled()
    with pytest.raises(ValueError, match="damaged"):
        DatasetCatalog.get("b")
    assert gc.isenabled() and seen == [False, False]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["x", "voc", "a", "b"], "'x' has the unknown format 'voc'; known are coco, caltech"),
        (["x", "coco", "a"], "an entry is .*not"),
        (["x", "coco", "a", 3], "an entry is .*not"),
        ("x", "an entry is .*not x"),
    ],
)
def test_wrong_entries(entry, message):
    # Not a CfgNode, which would not take some of these.
    cfg = SimpleNamespace(HKD=SimpleNamespace(DATA=SimpleNamespace(REGISTER=[entry])))
    with pytest.raises(ValueError, match=f"HKD.DATA.REGISTER: .*{message}"):
        register_datasets(cfg)


def test_check_records(config):
    config()
    with pytest.raises(ValueError, match="'unheard_of' is not registered"):
        check_records("unheard_of")
    DatasetCatalog.register("empty", list)
    with pytest.raises(ValueError, match="'empty' has no images"):
        check_records("empty")
