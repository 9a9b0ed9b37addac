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
from hkd_d2.data import images
from hkd_d2.data.images import as_array, check_image, read_image, resize, resized_shape

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
            "more pixels than the 50000000 that are decoded",
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


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_lose_the_lower_byte(form):
    options = {"irreversible": False} if form == "JPEG2000" else {}
    try:
        content = encoded(Image.fromarray(RAMP), form, **options)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {form} of 16 bits")
    for part in (RAMP, RAMP[100:101, 7:9]):  # whatever its range
        content = encoded(Image.fromarray(part), form, **options)
        np.testing.assert_array_equal(read_image(content), np.dstack([part >> 8] * 3))


def tiff(pixels, bits, white_is_zero=False, sample_format=1, order="<"):
    """An uncompressed TIFF of one channel, written by its definition."""
    body = pixels.tobytes()
    tags = {256: pixels.shape[1], 257: pixels.shape[0], 258: bits, 259: 1}
    tags |= {262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: pixels.shape[0]}
    tags |= {279: len(body), 339: sample_format}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(body))
    rows = b"".join(struct.pack(order + "HHII", t, 4, 1, v) for t, v in sorted(tags.items()))
    return head + body + struct.pack(order + "H", len(tags)) + rows + bytes(4)


def test_depth_of_tiff():
    wanted = np.dstack([RAMP >> 8] * 3)
    np.testing.assert_array_equal(read_image(tiff(RAMP, 16)), wanted)
    big = tiff(RAMP.astype(">u2"), 16, order=">")
    np.testing.assert_array_equal(read_image(big), wanted)
    np.testing.assert_array_equal(read_image(tiff(RAMP, 16, white_is_zero=True)), 255 - wanted)
    # 12 bits: two values in three bytes.
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    a, b = values.reshape(-1, 2).T.astype(np.uint16)
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8)
    content = tiff(packed.reshape(64, 96), 12).replace(
        struct.pack("<HHII", 256, 4, 1, 96), struct.pack("<HHII", 256, 4, 1, 64)
    )
    np.testing.assert_array_equal(read_image(content)[..., 0], values >> 4)


def test_depths_without_a_rule_are_refused():
    numbers = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for content in (
        encoded(Image.fromarray(numbers), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        tiff(RAMP.astype(np.int16), 16, sample_format=2),
    ):
        with pytest.raises(ValueError, match="values, for which there is no rule"):
            read_image(content)
        with pytest.raises(ValueError, match="values, for which there is no rule"):
            check_image(content)
    with pytest.raises(ValueError, match="floating-point values"):
        as_array(Image.fromarray(numbers))
    np.testing.assert_array_equal(as_array(Image.fromarray(RAMP))[..., 1], RAMP >> 8)


def test_sixteen_bits_are_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(RAMP[:100]), "PNG", exif=exif)
    np.testing.assert_array_equal(read_image(content)[..., 0], np.rot90(RAMP[:100] >> 8, -1))


def test_the_cut_picture_that_pillow_opened():
    picture = Image.open(io.BytesIO(encoded(Image.fromarray(noise()))[:-2000]))
    with pytest.raises(ValueError, match="^The image cannot be read: it is cut short or damaged"):
        as_array(picture)


def test_transparency_is_dropped_without_a_word(recwarn):
    picture = Image.fromarray(noise()).convert("P")
    content = encoded(picture, transparency=bytes(range(256)))
    np.testing.assert_array_equal(read_image(content), np.asarray(picture.convert("RGB")))
    assert not [w for w in recwarn if "ransparency" in str(w.message)]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read(form):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if form == "WEBP" else {}
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert (read_image(content) == (255, 0, 0)).all()


def many_scans(count):
    """A progressive JPEG whose last scan stands so often."""
    content = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * count + content[-2:]


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(extra):
    content = encoded(Image.new("L", (8, 8)))
    return content[:33] + extra + content[33:]


def run_lengths(side, body):
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 256)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + header + bytes(1024) + body


def with_tag(tag, kind, count, value):
    """A TIFF whose directory has this entry beside its own."""
    content = tiff(RAMP[:4, :4], 16)
    place = int.from_bytes(content[4:8], "little")
    entries = int.from_bytes(content[place : place + 2], "little") + 1
    row = struct.pack("<HHII", tag, kind, count, value)
    return content[:place] + struct.pack("<H", entries) + row + content[place + 2 :]


COSTLY = {
    "scans": (many_scans(images.MAX_SCANS), "more than 64 scans"),
    "segments": (
        many_scans(1)[:2] + b"\xff\xfe\0\2" * 1100 + many_scans(1)[2:],
        "more than 1000 segments",
    ),
    "junk": (many_scans(1)[:2] + bytes(2**18) + many_scans(1)[2:], "more than 1000 segments"),
    "chunks": (with_chunks(chunk(b"IDAT") * 66_000), "more than 65536 chunks"),
    "profiles": (
        with_chunks(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**20 - 1))) * 300),
        "more than 256 chunks beside",
    ),
    "strips": (with_tag(273, 4, 70_000, 8), "more than 65536 values in its tag 273"),
    "tiles": (with_tag(323, 4, 1, 200_000_000), "tiles of more than 178956970"),
    "run lengths": (run_lengths(100, b"\1\7" * 600_000), "run-length encoded BMP of more than"),
    "rows": (run_lengths(4000, b"\1\7\0\0" * 4000), "run-length encoded BMP of more than"),
}


@pytest.mark.parametrize("what", COSTLY)
def test_what_takes_long_to_decode_is_refused_undecoded(what, monkeypatch):
    content, sentence = COSTLY[what]
    opened = []
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a))
    for reader in (read_image, check_image):
        with pytest.raises(ValueError, match=f"^The image .*{sentence}.*; save it anew"):
            reader(content)
    assert not opened


def test_ordinary_files_are_far_from_the_bounds():
    plain = Image.fromarray(noise(200, 300))
    progressive = encoded(plain, "JPEG", progressive=True)
    for content in (
        progressive,
        progressive + b"\xff\xda" * 1000,  # behind the end
        many_scans(40),
        with_chunks(chunk(b"tEXt", b"Title\0street") * 60),
        encoded(plain, "JPEG", icc_profile=bytes(500_000)),
        encoded(plain, "JPEG", comment=b"\xff\xda" * 1000),
        run_lengths(100, b"\x64\7\0\0" * 100),
        encoded(plain, "TIFF", compression="tiff_deflate"),
    ):
        assert read_image(content).ndim == 3
