import json
import logging
import os

import pytest
from detectron2.structures import BoxMode

from hkd_d2.data.datasets.cache import cache_folder, cached_records
from hkd_d2.data.datasets.records import make_annotation

ROW = make_annotation([1, 2, 3.5, 4], where="here", image_size=(9, 9), vis_bbox=[1, 2, 3, 1])
RECORDS = [{"file_name": "a", "image_id": 0, "height": 9, "width": 9, "annotations": [ROW]}]


@pytest.fixture
def load(tmp_path):
    """A function that loads through the cache, and the number of times that it parsed."""
    (tmp_path / "source").write_text("one")

    def call():
        def parse():
            call.parsed += 1
            return RECORDS

        return cached_records("set-val", str(tmp_path), [str(tmp_path / "source")], parse)

    call.parsed = 0
    return call


def cache_file():
    (name,) = os.listdir(cache_folder())
    return os.path.join(cache_folder(), name)


def test_parsed_once_and_equal(load):
    assert load() == load() == load() == RECORDS
    assert load.parsed == 1
    row = load()[0]["annotations"][0]
    assert row["bbox_mode"] is BoxMode.XYWH_ABS
    assert [type(row[key]) for key in ("iscrowd", "vis_ratio")] == [int, float]
    assert all(type(v) is float for v in row["bbox"] + row["vis_bbox"])


def test_a_change_is_seen(load, tmp_path, caplog):
    load()
    (tmp_path / "source").write_text("three")  # length
    with caplog.at_level(logging.INFO, logger="hkd_d2"):
        load()
    assert load.parsed == 2 and "the data set or its loader has changed" in caplog.text
    os.utime(tmp_path / "source", ns=(1, 1))  # time of change
    load(), load()
    assert load.parsed == 3


@pytest.mark.parametrize("content", ["", '{"key"', "[]", "{}", "3", "\udcff"])
def test_a_damaged_cache_is_made_anew(load, caplog, content):
    load()
    with open(cache_file(), "wb") as f:
        f.write(content.encode("utf-8", "surrogateescape"))
    assert load() == RECORDS and load.parsed == 2
    assert len(caplog.records) == 1 and "the cache is damaged" in caplog.text
    assert load() == RECORDS and load.parsed == 2


def test_damaged_records(load):
    load()
    content = json.loads(open(cache_file()).read())
    del content["records"][0]["annotations"]
    with open(cache_file(), "w") as f:
        json.dump(content, f)
    assert load() == RECORDS and load.parsed == 2


def test_without_a_place_to_write(load, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HKD_D2_CACHE", str(tmp_path / "source"))  # a file
    assert load() == RECORDS and load() == RECORDS
    assert load.parsed == 2 and "the cache cannot be written" in caplog.text
