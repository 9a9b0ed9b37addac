"""Fixtures of the commands on data sets."""

from functools import partial

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from helpers import small_citypersons
from hkd_d2.cli.dispatch import run_command


@pytest.fixture
def write_citypersons(tmp_path):
    """A function that writes a small data set in the given forms and returns its root."""
    return partial(small_citypersons.write_citypersons, tmp_path / "citypersons")


@pytest.fixture
def visualize():
    """hkd data view; the data sets that it registers are forgotten afterwards."""
    before = set(DatasetCatalog.list())
    yield partial(run_command, "data view")
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
