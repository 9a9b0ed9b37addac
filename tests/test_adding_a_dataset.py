"""docs/adding_a_dataset.md, executed: its loader in a file outside the package, and its config."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from helpers.rules import rule
from hkd_d2.config import load_config
from hkd_d2.data.datasets import register_datasets
from hkd_d2.data.datasets.register import FOLDERS

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "adding_a_dataset.md"


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """The document's config, with its loader in a package and its data in the folder it names."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    blocks = dict(found)
    assert len(blocks) == len(found) == 2
    package = tmp_path / "elsewhere" / "my_team"
    package.mkdir(parents=True)
    (package / "walkers.py").write_text(blocks["python"])
    data = tmp_path / "data" / "walkers"
    (data / "images").mkdir(parents=True)
    for name in ("0001", "0002"):
        Image.new("RGB", (320, 192)).save(data / "images" / f"{name}.png")
    rows = "images/0001.png 210 40 55 130\nimages/0002.png 1 2 3 4\nimages/0001.png 5 6 7 8.5\n"
    for split in ("train", "val"):
        (data / f"{split}.txt").write_text(rows)
    (tmp_path / "mine.yaml").write_text(blocks["yaml"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(package.parent)
    importlib.invalidate_caches()
    yield load_config("mine.yaml")
    FOLDERS.pop("walkers", None)
    for name in ("streets_of_mine", "streets_to_test", "walkers_train", "walkers_val"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    for name in ("my_team.walkers", "my_team"):
        sys.modules.pop(name, None)


@rule("A data format is one file, outside the package and inside")
def test_the_example_loads(cfg):
    register_datasets(cfg)
    first, second = DatasetCatalog.get("streets_of_mine")
    assert first["file_name"].endswith("images/0001.png")
    assert (first["height"], first["width"]) == (192, 320)
    assert [a["bbox"] for a in first["annotations"]] == [[210, 40, 55, 130], [5, 6, 7, 8.5]]
    assert [a["ignore"] for a in first["annotations"]] == [0, 0]
    assert [a["bbox"] for a in second["annotations"]] == [[1, 2, 3, 4]]
    for listing in ("__init__.py", "register.py", "formats.py"):  # no list of the formats
        assert "pennfudan" not in (ROOT / "hkd_d2" / "data" / "datasets" / listing).read_text()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [("images/0001.png 1 2 3", "line 2: write an image"), ("images/0001.png 1 2 x 4", "numbers")],
)
def test_a_bad_row_is_named(cfg, row, sentence):
    Path("data/walkers/train.txt").write_text(f"images/0001.png 1 2 30 40\n{row}\n")
    register_datasets(cfg)
    with pytest.raises(ValueError, match=sentence):
        DatasetCatalog.get("streets_of_mine")
