import json
import os

import pytest
from small_datasets import write_image

from hkd_d2.data.datasets import image_sizes as module
from hkd_d2.data.datasets.image_sizes import image_sizes


@pytest.fixture
def headers_read(monkeypatch):
    """Names of the images whose headers were read."""
    names = []
    read = module.image_size
    monkeypatch.setattr(
        module, "image_size", lambda path: names.append(os.path.basename(path)) or read(path)
    )
    return names


@pytest.fixture
def folder(tmp_path):
    for name, size in {"a.jpg": (20, 30), "b.jpg": (40, 50), "c.png": (7, 9)}.items():
        write_image(tmp_path / "images" / name, size)
    return tmp_path / "images"


def test_each_header_is_read_once(folder, cache_folder, headers_read):
    assert image_sizes(str(folder), ["b.jpg", "a.jpg"], "x") == [(40, 50), (20, 30)]
    assert image_sizes(str(folder), ["a.jpg", "c.png", "b.jpg"], "x") == [
        (20, 30),
        (7, 9),
        (40, 50),
    ]
    assert image_sizes(str(folder), ["c.png"], "x") == [(7, 9)]
    assert sorted(headers_read) == ["a.jpg", "b.jpg", "c.png"]
    assert len(list(cache_folder.iterdir())) == 1  # no file is left over from the writing


def test_a_changed_image_is_read_again(folder, headers_read):
    image_sizes(str(folder), ["a.jpg", "b.jpg"], "x")
    headers_read.clear()
    status = os.stat(folder / "a.jpg")
    write_image(folder / "a.jpg", (60, 70))
    os.utime(folder / "a.jpg", ns=(0, status.st_mtime_ns))  # another length alone
    assert image_sizes(str(folder), ["a.jpg", "b.jpg"], "x") == [(60, 70), (40, 50)]
    os.utime(folder / "b.jpg", ns=(0, 1))  # another time alone
    image_sizes(str(folder), ["a.jpg", "b.jpg"], "x")
    assert headers_read == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "\xff", '{"a.jpg": 3}', '{"a.jpg": STAMP, 20]}', '{"a.jpg": STAMP, 20, "30"]}'],
)
def test_a_damaged_file_costs_the_reading(folder, cache_folder, headers_read, content):
    image_sizes(str(folder), ["a.jpg"], "x")
    (file,) = cache_folder.iterdir()
    status = os.stat(folder / "a.jpg")
    stamp = f"[{status.st_size}, {status.st_mtime_ns}"
    file.write_text(content.replace("STAMP", stamp), encoding="latin-1")
    assert image_sizes(str(folder), ["a.jpg"], "x") == [(20, 30)]
    assert image_sizes(str(folder), ["a.jpg"], "x") == [(20, 30)]
    assert headers_read == ["a.jpg"] * 2
    assert list(json.loads(file.read_text())) == ["a.jpg"]


def test_nowhere_to_write(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HKD_D2_CACHE", str(tmp_path / "file"))
    assert image_sizes(str(folder), ["a.jpg"], "x") == [(20, 30)]


def test_folders_of_one_name(folder, tmp_path, headers_read):
    write_image(tmp_path / "other" / "images" / "a.jpg", (1, 2))
    for _ in range(2):
        assert image_sizes(str(folder), ["a.jpg"], "x") == [(20, 30)]
        assert image_sizes(str(tmp_path / "other" / "images"), ["a.jpg"], "x") == [(1, 2)]
    assert headers_read == ["a.jpg"] * 2


def test_missing_and_broken_images(folder):
    with pytest.raises(FileNotFoundError, match="list.txt: 1 of 2 images are missing, .*/d.jpg"):
        image_sizes(str(folder), ["a.jpg", "d.jpg"], "list.txt")
    (folder / "d.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="The image '.*d.jpg' cannot be read"):
        image_sizes(str(folder), ["a.jpg", "d.jpg"], "list.txt")
