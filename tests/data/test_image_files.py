import io
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from hkd_d2.data import images
from hkd_d2.data.image_files import (
    check_image_files,
    find_images,
    image_size,
    usable_records,
)

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
UPRIGHT = Image.Exif()
UPRIGHT[0x0112] = 6  # a camera held upright


def encoded(form="JPEG", **options) -> bytes:
    content = io.BytesIO()
    NOISE.save(content, form, **options)
    return content.getvalue()


def with_thumbnail(picture: bytes) -> bytes:
    """The JPEG with another one, whole, in its header."""
    small = io.BytesIO()
    NOISE.resize((16, 12)).save(small, "JPEG")
    segment = b"Exif\0\0" + small.getvalue()
    return picture[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + picture[2:]


PICTURES = {
    "JPEG": encoded(),
    "JPEG with a thumbnail": with_thumbnail(encoded()),
    "progressive JPEG": encoded(progressive=True),
    "JPEG with restarts": encoded(restart_marker_rows=2),
    "MPO": encoded("MPO", save_all=True, append_images=[NOISE.resize((16, 12))]),
    "PNG": encoded("PNG"),
}
# What a camera or a copy leaves behind a picture.
TAILS = {"nothing": b"", "zeros": bytes(100), "a trailer": b"SEFT\xff\xda" * 1000}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HKD_D2_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def check(tmp_path):
    def check_bytes(content: bytes) -> str:
        """The sentence about a file with this content, and "" where there is none."""
        path = tmp_path / "1.jpg"
        path.write_bytes(content)
        try:
            check_image_files([{"file_name": str(path), "width": 128, "height": 96}], "mine")
        except ValueError as error:
            return str(error)
        assert read_image(str(path), "BGR").shape == (96, 128, 3)
        return ""

    return check_bytes


@pytest.mark.parametrize("form", list(PICTURES))
@pytest.mark.parametrize("tail", list(TAILS))
def test_a_whole_picture_may_have_a_tail(check, form, tail):
    assert check(PICTURES[form] + TAILS[tail]) == ""


@pytest.mark.parametrize("form", sorted(PICTURES.keys() - {"MPO"}))
@pytest.mark.parametrize("kept", [0.3, 0.99])
@pytest.mark.parametrize("tail", list(TAILS))
def test_a_part_of_a_picture_is_refused(check, form, kept, tail):
    """Zeros behind it are what a download leaves whose place was reserved; Pillow reads them."""
    sentence = check(PICTURES[form][: int(kept * len(PICTURES[form]))] + TAILS[tail])
    assert sentence.startswith("mine: the image '")
    assert "is cut short" in sentence or "cannot be read" in sentence


def test_where_the_end_may_be_missing(check):
    """Pillow, and so the training, refuses a JPEG without its end."""
    assert "is cut short" in check(encoded()[:-2])
    picture = PICTURES["MPO"]
    end = picture.index(b"\xff\xd9\xff\xd8") + 2  # the second picture begins
    assert check(picture[: end + 50]) == ""
    assert "is cut short" in check(picture[: end - 50])


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP"])
def test_the_size_is_that_of_the_picture_that_is_read(tmp_path, form):
    path = tmp_path / "1.jpg"
    path.write_bytes(encoded(form, exif=UPRIGHT))
    assert image_size(path) == read_image(str(path), "BGR").shape[:2] == (128, 96)
    path.write_bytes(encoded(form))
    assert image_size(path) == read_image(str(path), "BGR").shape[:2] == (96, 128)


FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "PPM", "GIF", "TGA", "WEBP", "JPEG2000")


@pytest.mark.parametrize("form", FORMATS)
def test_half_a_file_of_any_format_is_refused(tmp_path, form):
    path = tmp_path / "picture"  # the suffix does not decide
    record = {"file_name": str(path), "width": 128, "height": 96}
    content = io.BytesIO()
    try:
        NOISE.save(content, form)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {form}")
    path.write_bytes(content.getvalue())
    check_image_files([record], "mine")
    assert read_image(str(path), "RGB").shape == (96, 128, 3)
    path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    with pytest.raises(ValueError, match=f"^mine: the image '{path}' "):
        check_image_files([record], "mine")


def test_orientation_is_followed_in_every_format_that_keeps_it(tmp_path):
    """Turned to the right, the left edge is at the top."""
    mark = np.full((96, 128, 3), 40, np.uint8)
    mark[:, :16] = 220
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "MPO"):
        path = tmp_path / f"1.{form.lower()}"
        options = {"save_all": True, "append_images": [NOISE]} if form == "MPO" else {}
        Image.fromarray(mark).save(path, form, exif=UPRIGHT, **options)
        assert image_size(path) == images.check_image(path) == (128, 96), form
        pixels = images.read_image(path)
        assert pixels.shape == (128, 96, 3), form
        assert pixels[:12].min() > 180 and pixels[20:].max() < 80, form
        assert images.is_turned(path), form
        record = {"file_name": str(path), "width": 128, "height": 96}
        with pytest.raises(ValueError, match="96x128 pixels as it is read .*turns the stored 128x"):
            check_image_files([record], "mine")
        check_image_files([record | {"width": 96, "height": 128}], "mine")


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    content = encoded("PNG", exif=UPRIGHT)
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    path = tmp_path / "late.png"
    path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    assert image_size(path) == images.read_image(path).shape[:2] == (128, 96)


def test_a_picture_of_which_nothing_is_left(tmp_path):
    records = []
    for name, size in (("a.png", (64, 48)), ("line.png", (2000, 1)), ("b.png", (64, 48))):
        Image.new("RGB", size).save(tmp_path / name)
        records.append({"file_name": str(tmp_path / name), "width": size[0], "height": size[1]})
    check_image_files(records, "mine")
    check_image_files(records, "mine", [(600, 2000), (0, 0)])
    sentence = "line.png' is 2000x1 pixels, of which nothing is left .* resized to 900"
    with pytest.raises(ValueError, match=f"^mine: the image .*{sentence}"):
        check_image_files(records, "mine", [(600, 2000), (600, 900)])
    said = []
    usable = usable_records(records, [(600, 900)], said.append)
    assert usable == [records[0], records[2]]
    assert len(said) == 1 and said[0].startswith("The image '") and "line.png" in said[0]


def test_what_passed_is_not_decoded_again(tmp_path, monkeypatch):
    path = tmp_path / "1.jpg"
    path.write_bytes(encoded())
    record = {"file_name": str(path), "width": 128, "height": 96}
    decoded = []

    def check_image(path, **options):
        decoded.append(path)
        return images.check_image(path, **options)

    monkeypatch.setattr("hkd_d2.data.image_files.check_image", check_image)
    check_image_files([record], "mine")
    check_image_files([record], "mine")
    assert len(decoded) == 1
    with pytest.raises(ValueError, match="128x96 pixels and its annotation says 127x96"):
        check_image_files([record | {"width": 127}], "mine")
    assert len(decoded) == 1
    # A line that was cut in writing says nothing.
    memory = tmp_path / "cache" / "checked_images.txt"
    memory.write_bytes(memory.read_bytes()[:-2])
    check_image_files([record], "mine")
    assert len(decoded) == 2
    path.write_bytes(encoded()[:-20])
    for _ in range(2):  # a fault is not remembered
        with pytest.raises(ValueError, match="is cut short"):
            check_image_files([record], "mine")
    assert len(decoded) == 4


def test_no_files_and_names_that_are_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for its other end
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        path = str(tmp_path / name)
        with pytest.raises(ValueError, match="is no file but a folder, pipe or device"):
            check_image_files([{"file_name": path}], "mine")
        with pytest.raises(FileNotFoundError, match="is no file"):
            image_size(path)
    with pytest.raises(ValueError, match="'gone.png' does not exist"):
        check_image_files([{"file_name": "gone.png"}], "mine")
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    NOISE.save(path, "PNG")
    check_image_files([{"file_name": path, "width": 128, "height": 96}], "mine")
    assert image_size(path) == (96, 128)


def test_linked_folders_are_followed_once(tmp_path):
    for name in ("shots/own.png", "elsewhere/b.png", "elsewhere/deep/c.PGM"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        NOISE.save(tmp_path / name, "PNG")
    (tmp_path / "shots/day2").symlink_to("../elsewhere")
    (tmp_path / "shots/again").symlink_to("../elsewhere/deep")
    (tmp_path / "elsewhere/deep/up").symlink_to("../../shots")
    found = [r["file_name"] for r in find_images(str(tmp_path / "shots"))]
    names = sorted(Path(name).name for name in found)
    assert names == ["b.png", "c.PGM", "own.png"] and found == sorted(found)
