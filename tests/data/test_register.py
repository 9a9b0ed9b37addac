import gc
import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from hkd_d2.config import add_hkd_config, load_config
from hkd_d2.data.datasets import (
    check_records,
    register,
    register_builtin_datasets,
    register_datasets,
    register_unnamed,
)
from hkd_d2.data.datasets.formats import folder_format


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
    register_builtin_datasets()  # names stay
    assert MetadataCatalog.get("citypersons_val").hkd_entry == ("citypersons", root, "val")


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


@pytest.mark.parametrize(
    "name", ["", "mine/val", "mine\\val", "a\nb", "a\0b", "\x1b[31m", "\ud800", "n" * 201]
)
def test_a_name_that_no_result_file_can_have(config, coco_file, name):
    cfg = config([name, "coco", str(coco_file), str(coco_file.parent)])
    with pytest.raises(ValueError, match="HKD.DATA.REGISTER: .*choose a"):
        register_datasets(cfg)
    assert name not in DatasetCatalog.list()


@pytest.mark.parametrize("name", ["a b", "50%", "#1", "\u4eba", 'it\'s "mine"', "caf\udce9", ".."])
def test_other_names_are_good_for_files(config, coco_file, name):
    register_datasets(config([name, "coco", str(coco_file), str(coco_file.parent)]))
    assert len(check_records(name)) == 1
    (coco_file.parent / f"detections_{name}.json").write_text("[]")


def test_a_data_set_of_the_command_line_gets_a_name(config, coco_file, tmp_path):
    config()
    name = register_unnamed("coco", str(coco_file), str(tmp_path))
    assert name == f"coco_gt.json_{tmp_path.name}"[:50]
    assert register_unnamed("coco", str(coco_file), str(tmp_path)) == name
    other = tmp_path / "other" / "gt.json"
    other.parent.mkdir()
    other.write_text(coco_file.read_text())
    assert register_unnamed("coco", str(other), str(tmp_path)) == f"{name}-2"
    assert len(check_records(name)) == 1
    odd = register_unnamed("coco", str(tmp_path / "a\nb"), "/")
    assert odd == "coco_a_b"


FORMAT = """
from hkd_d2.data.datasets.formats import folder_format


@folder_format("{form}", ("all",))
def load(root, split, *, check_images=True):
    \"\"\"One image without rows.\"\"\"
    return [
        {{"file_name": root + "/1.png", "image_id": 1, "height": 9, "width": 9, "annotations": []}}
    ]
"""


@pytest.fixture
def outside_format(tmp_path, monkeypatch):
    """A format of a module outside the package, forgotten afterwards."""
    (tmp_path / "walkers_of_a_team.py").write_text(FORMAT.format(form="walkers"))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("walkers_of_a_team")
    register.FOLDERS.pop("walkers", None)
    sys.modules.pop("walkers_of_a_team", None)


def test_a_format_from_outside_the_package(config, outside_format, tmp_path):
    register_datasets(config(["ours", "walkers", str(tmp_path), "all"]))
    assert [r["file_name"] for r in check_records("ours")] == [f"{tmp_path}/1.png"]
    assert MetadataCatalog.get("ours").thing_classes == ["pedestrian"]
    assert "walkers_all" in DatasetCatalog.list()  # its built-in name came with it


def test_a_config_brings_a_format(config, outside_format, tmp_path):
    config()
    register.FOLDERS.pop("walkers")
    sys.modules.pop("walkers_of_a_team")
    entry = ["theirs", "walkers", str(tmp_path), "all"]
    text = f"HKD:\n  IMPORTS: [walkers_of_a_team]\n  DATA: {{REGISTER: [{json.dumps(entry)}]}}\n"
    (tmp_path / "run.yaml").write_text(text)
    register_datasets(load_config(str(tmp_path / "run.yaml")))
    assert [r["image_id"] for r in check_records("theirs")] == [1]


@pytest.mark.parametrize("form", ["caltech", "coco"])
def test_a_format_whose_name_is_taken(form):
    with pytest.raises(ValueError, match=f"format '{form}' is taken by .*; choose another name"):
        folder_format(form, ("all",))(lambda root, split: [])


def test_every_module_with_a_format_is_found():
    """A new file is enough: no list names the loaders."""
    folder = Path(register.__file__).parent
    entered = {
        form
        for path in folder.glob("*.py")
        for form in re.findall(r'^@folder_format\("(\w+)"', path.read_text(), re.MULTILINE)
    }
    assert entered == set(register.FOLDERS) and len(entered) == 9
