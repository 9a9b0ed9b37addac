import io

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from hkd_d2.data.image_files import check_image_files, image_size

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
    assert "is cut short; restore it" in sentence or "cannot be read" in sentence


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
