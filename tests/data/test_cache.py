import json
import logging
import os
import sys
from pathlib import Path

import pytest
from detectron2.structures import BoxMode

from helpers.rules import rule
from helpers.small_datasets import (
    SAMPLES,
    child,
    write_eurocity,
    write_image,
    write_text,
    write_vbb,
)
from hkd_d2.data.cache import cached_records
from hkd_d2.data.datasets.records import make_annotation
from hkd_d2.data.datasets.register import FOLDERS

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


@pytest.fixture
def cache_file(cache_folder):
    """A function that returns the only file of the cache."""

    def only():
        (path,) = cache_folder.iterdir()
        return path

    return only


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
def test_a_damaged_cache_is_made_anew(load, cache_file, caplog, content):
    load()
    with open(cache_file(), "wb") as f:
        f.write(content.encode("utf-8", "surrogateescape"))
    assert load() == RECORDS and load.parsed == 2
    assert len(caplog.records) == 1 and "the cache is damaged" in caplog.text
    assert load() == RECORDS and load.parsed == 2


def test_damaged_records(load, cache_file):
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


def test_nothing_is_left_of_a_file_that_could_not_be_written(load, cache_folder, monkeypatch):
    monkeypatch.setattr("os.replace", _full)
    assert load() == RECORDS
    assert list(cache_folder.iterdir()) == []


def _full(*_):
    raise OSError(28, "No space left on device")


# What every data set does with the cache. A sample: what writes it under a folder; format; split.


def _write_caltech_old(root):
    for number in range(6, 11):
        rows = {30: [(1, [20.5, 30, 10, 25], [21, 30, 3, 25])]}
        write_vbb(root / f"annotations/set{number:02d}/V000.vbb", 60, ["person"], rows)
        for frame in (29, 59):
            write_image(root / f"images/set{number:02d}_V000_I{frame:05d}.jpg", (480, 640))


def _write_kaist_json(root):
    names = ["set06/V000/I00019", "set09/V000/I00019"]
    for name in names:
        write_image(root / f"images/{name.replace('/I', '/visible/I')}.jpg", (512, 640))
    images = [
        {"id": i, "im_name": name, "height": 512, "width": 640} for i, name in enumerate(names)
    ]
    row = {"id": 0, "image_id": 0, "category_id": 1, "bbox": [20, 30, 10.1, 70], "ignore": 0}
    row |= {"height": 70, "occlusion": 2}
    content = {
        "images": images,
        "annotations": [row],
        "categories": [{"id": 1, "name": "person"}],
    }
    write_text(root / "kaist_annotations_test20.json", json.dumps(content))


EVERY = {form: (write, form, split) for form, (write, split) in SAMPLES.items()} | {
    "caltech, old": (_write_caltech_old, "caltech", "test"),
    "kaist, JSON": (_write_kaist_json, "kaist", "test"),
    "eurocity, no identity": (
        lambda root: write_eurocity(
            root, "day", "val", {"rome/a": [child(None, 1, 2, 3.7, 4, "truncated>10")]}
        ),
        "eurocity",
        "day_val",
    ),
    "citypersons, cityscapes": ("cityscapes", "citypersons", "val"),
    "citypersons, mat": ("mat", "citypersons", "val"),
    "citypersons, coco": ("coco", "citypersons", "val"),
}


@pytest.fixture(params=sorted(EVERY))
def data_set(request, tmp_path, write_citypersons):
    """Format, root and split of a small data set, and its loader."""
    write, form, split = EVERY[request.param]
    root = tmp_path / form
    if form == "citypersons":
        write_citypersons(write)
    else:
        write(root)
    return form, root, split, lambda root=root: FOLDERS[form][1](str(root), split)


@pytest.fixture
def refuse_to_parse(monkeypatch):
    """A function after whose call a loader that would parse its files raises Parsed."""

    def parse():
        raise Parsed

    def cached(name, root, sources, _, **options):
        return cached_records(name, root, sources, parse, **options)

    def refuse():
        for name, module in list(sys.modules.items()):
            if name.startswith("hkd_d2.data.datasets.") and hasattr(module, "cached_records"):
                monkeypatch.setattr(module, "cached_records", cached)

    return refuse


class Parsed(Exception):
    pass


@rule("Nothing is parsed twice: the cache gives the same bits, and any changed source is seen")
def test_every_data_set_is_parsed_once(data_set, refuse_to_parse, monkeypatch):
    _, root, _, load = data_set
    parsed = load()
    refuse_to_parse()
    # Types and bits too: repr tells 1 from 1.0 and writes every digit of a float.
    assert repr(load()) == repr(parsed)
    # A relative path is the same folder.
    monkeypatch.chdir(root.parent)
    assert repr(load(root.name)) == repr(parsed)


@rule("Nothing is parsed twice: the cache gives the same bits, and any changed source is seen")
def test_every_changed_source_is_seen(data_set, refuse_to_parse):
    form, root, _, load = data_set
    records = load()
    refuse_to_parse()
    images = {record["file_name"] for record in records}
    files = [path for path in root.rglob("*") if path.is_file()]
    sources = [path for path in files if str(path) not in images]
    if form in ("crowdhuman", "widerperson"):  # the sizes stand in the images alone
        sources = files
    assert sources
    for path in sources:
        time = path.stat().st_mtime_ns
        os.utime(path, ns=(time, time + 1))
        with pytest.raises(Parsed):
            load()
        os.utime(path, ns=(time, time))
        load()


@pytest.mark.parametrize("form", ["crowdhuman", "widerperson"])
def test_an_image_of_another_size_is_seen(form, tmp_path):
    write, split = SAMPLES[form]
    write(tmp_path)
    load = FOLDERS[form][1]
    first, second = load(str(tmp_path), split)
    write_image(Path(second["file_name"]), (70, 80))
    assert load(str(tmp_path), split) == [first, second | {"height": 70, "width": 80}]


def test_a_source_that_has_gone_is_named(data_set):
    """The loader says it, not the cache."""
    _, root, _, load = data_set
    records = load()
    images = {record["file_name"] for record in records}
    for path in root.rglob("*"):
        if path.is_file() and str(path) not in images:
            content = path.read_bytes()
            path.unlink()
            try:
                found = load()
            except FileNotFoundError as error:
                assert "Errno" not in str(error) and str(root) in str(error)
            else:  # one of several files in a folder, each an image of its own
                assert len(found) < len(records)
            path.write_bytes(content)
