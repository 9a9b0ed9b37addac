"""Images are decoded within bounds, upright, and seen at Detectron2's size."""

import io
import struct
import zlib

import numpy as np
import pytest
from detectron2.data import detection_utils
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from helpers.rules import rule
from hkd_d2.inference.images import as_array, read_image, resize, resized_shape

pytestmark = rule("Pictures are decoded within bounds")


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(height=37, width=53, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_equals_detectron2_in_every_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    path.write_bytes(encoded(Image.fromarray(noise()), "JPEG", exif=exif))
    wanted = detection_utils.read_image(str(path), "RGB")
    assert wanted.shape == ((37, 53, 3) if orientation < 5 else (53, 37, 3))
    np.testing.assert_array_equal(read_image(path), wanted)
    np.testing.assert_array_equal(read_image(path.read_bytes()), wanted)
    np.testing.assert_array_equal(as_array(Image.open(path)), wanted)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_other_colours_become_rgb(mode):
    form = "TIFF" if mode == "CMYK" else "PNG"
    pixels = read_image(encoded(Image.fromarray(noise()).convert(mode), form))
    assert pixels.shape == (37, 53, 3) and pixels.dtype == np.uint8


def bomb(width, height):
    """A PNG of a few hundred bytes that says it has width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    "source, sentence",
    [
        (b"", "cannot be read"),
        (b"GIF89a" + bytes(100), "cannot be read"),  # a format that is not admitted
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
        (encoded(Image.fromarray(noise()), "JPEG")[:-400], "cut short or damaged"),
        (encoded(Image.fromarray(noise()))[:-2000], "cut short or damaged"),
        (bomb(8000, 8000), "8000x8000 pixels and at most 50000000"),
        (
            bomb(100_000, 100_000),
            "cannot be read; .* at most 50000000 pixels",
        ),  # Pillow's own bound
        (bytes(2**20), "cannot be read"),
    ],
    ids=["empty", "gif", "eps", "cut jpeg", "cut png", "bomb", "large bomb", "zeros"],
)
def test_what_is_refused(source, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_image(source)


def test_bounds(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(Image.fromarray(noise(10, 10))))
    size = path.stat().st_size
    assert read_image(path, max_bytes=size, max_pixels=100).shape == (10, 10, 3)
    for source in (path, path.read_bytes()):
        with pytest.raises(ValueError, match=f"has {size} bytes and at most {size - 1}"):
            read_image(source, max_bytes=size - 1)
        with pytest.raises(ValueError, match="10x10 pixels and at most 99"):
            read_image(source, max_pixels=99)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize(
    "array", [noise()[..., :2], noise().astype(np.float32), noise()[0], noise()[:0], None]
)
def test_arrays_of_another_form(array):
    with pytest.raises(ValueError, match="uint8 RGB array"):
        as_array(array)


@pytest.mark.parametrize("size", [(192, 320), (600, 1333), (37, 37), (1024, 2048), (0, 100)])
@pytest.mark.parametrize("shape", [(37, 53), (480, 640), (640, 481), (9, 400), (1080, 1920)])
def test_resized_as_detectron2(shape, size):
    image = noise(*shape)
    transform = ResizeShortestEdge([size[0], size[0]], size[1]).get_transform(image)
    wanted = transform.apply_image(image)
    assert resized_shape(*shape, *size) == wanted.shape[:2]
    np.testing.assert_array_equal(resize(image, wanted.shape[:2]), wanted)


def test_nothing_is_left_of_a_line():
    with pytest.raises(ValueError, match="2000x1 pixels is too narrow"):
        resized_shape(1, 2000, 600, 900)
