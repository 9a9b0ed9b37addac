"""A small data set in the three forms of CityPersons, and commands on data sets."""

from functools import partial

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from helpers import small_citypersons
from helpers.published_data import published_data
from hkd_d2.cli.dispatch import run_command


@pytest.fixture
def scenes():
    return small_citypersons.SCENES


@pytest.fixture
def write_citypersons(tmp_path):
    """A function that writes SCENES under a new root in the given forms and returns the root."""
    return partial(small_citypersons.write_citypersons, tmp_path / "citypersons")


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    """A cache of the test's own."""
    monkeypatch.setenv("HKD_D2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def visualize():
    """hkd data view; the data sets that it registers are forgotten afterwards."""
    before = set(DatasetCatalog.list())
    yield partial(run_command, "data view")
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
