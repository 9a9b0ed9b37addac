"""The one reader of pictures, for training, tools, library and service alike.

It decides which files are pictures, how deep and how large they are, and which way up they stand.
It imports NumPy and Pillow alone, so that inference without PyTorch and the data loaders may both
build on it. A file may be a stranger's: what it would cost to decode is known before it is decoded.

Depth: 16 bits become 8 by dropping the lower byte (``>> 8``; fewer significant bits that the file
declares, as in TIFF's 12, are dropped down to 8 likewise), never by the range of its values.
Floating-point and 32-bit pictures have no such rule and are refused. Of several frames or pages
the first is read; transparency is dropped.
"""

import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# Bounds of one encoded image, ours: a photograph of 50 megapixels has some 30 MB as JPEG.
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
# Bound of one's own data sets: the size from which Pillow refuses an image.
MAX_DATA_PIXELS = 178_956_970
# Bounds of what decoding costs beside pixels and bytes; each is far above what cameras and
# encoders write and keeps a file of the largest size under about a second.
MAX_SCANS = 64  # of a JPEG; progressive ones have about 10
MAX_SEGMENTS = 1000  # of a JPEG's header
MAX_CHUNKS = 65_536  # of a PNG
MAX_ANCILLARY_CHUNKS = 256  # of a PNG, beside those of pixels; each may hold a compressed megabyte
MAX_TAG_VALUES = 65_536  # of one tag of a TIFF, such as the places of its strips
MAX_RLE_PIXELS = 4_000_000  # of a run-length encoded BMP, which Pillow decodes in Python
MAX_RLE_BYTES = 2**20

# What strangers may send; Pillow knows many more.
UPLOAD_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
# Drawn by programs of their own (Ghostscript, Windows) rather than decoded.
_NOT_PIXELS = {"EPS", "WMF"}
# Suffixes of what counts as a picture in a folder.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".pgm", ".ppm", ".gif", ".tga", ".jp2"),
)
_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MARKER = re.compile(rb"\xff[^\x00\xff]")  # of a JPEG
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # no stuffed byte, no restart
_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # nothing follows them: TEM, restarts, start

# The bounds are ours and refuse by a sentence; Pillow's half of its own is a warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageTooLarge(ValueError):
    """An image beyond the bounds of bytes and pixels, which may well be whole."""


def read_image(
    source: str | Path | bytes,
    *,
    max_bytes: int | None = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[str] | None = None,
) -> np.ndarray:
    """Decode one image, turned as its orientation tag says.

    Args:
        source: path of an image, or its encoded bytes, for which no file is opened.
        max_bytes: most bytes of the encoded image; None for any number.
        max_pixels: most pixels of the decoded image.
        formats: Pillow's names of the formats that are admitted, such as ``UPLOAD_FORMATS``; None
            for all that Pillow decodes.

    Returns:
        ndarray: (H, W, 3) uint8, RGB.

    Raises:
        FileNotFoundError: no such file.
        ImageTooLarge: a ValueError, too many bytes or pixels.
        ValueError: another format, cut short, damaged, of floating-point or 32-bit values, or made
            to take long: beyond the bounds above.
    """
    name = _name(source)
    content = _content(source, name, max_bytes)
    with _open(content, name, max_pixels, formats) as image:
        _load(image, content, name)
        return _to_rgb(image, name)


def read_data_image(path: str | os.PathLike) -> np.ndarray:
    """:func:`read_image` of one's own data: any number of bytes, ``MAX_DATA_PIXELS`` pixels."""
    return read_image(path, max_bytes=None, max_pixels=MAX_DATA_PIXELS)


def check_image(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Decode one image for its errors alone, which is faster than reading it.

    Returns:
        tuple[int, int]: (height, width) as :func:`read_image` gives it.

    Raises:
        FileNotFoundError, ImageTooLarge, ValueError: as :func:`read_image`.
    """
    name = _name(source)
    content = _content(source, name, None)
    with _open(content, name, max_pixels, None) as image:
        width, height = image.size
        if image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (1, 1))  # at an eighth of the size: every bit is still read
        _load(image, content, name)
        _check_depth(image, name)
        turned = image.format != "TIFF" and _orientation(image) >= 5
    return (width, height) if turned else (height, width)


def image_size(path: str | os.PathLike, *, max_pixels: int = MAX_DATA_PIXELS) -> tuple[int, int]:
    """(height, width) of an image as :func:`read_image` gives it, mostly from the header alone.

    Raises:
        FileNotFoundError: no such file.
        ImageTooLarge: a ValueError, too many pixels.
        ValueError: the header cannot be read.
    """
    name = _name(path)
    _check_file(path, name)
    with _open(path, name, max_pixels, None) as image:
        width, height = image.size
        turned = _is_turned(image, name)
    return (width, height) if turned else (height, width)


def is_turned(path: str | os.PathLike) -> bool:
    """Tell whether an orientation tag swaps the stored width and height when the image is read."""
    name = _name(path)
    with _open(path, name, MAX_DATA_PIXELS, None) as image:
        if image.format == "TIFF":  # Pillow's size is that of the turned image
            return image.tag_v2.get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return _is_turned(image, name)


def find_files(folder: str | os.PathLike, suffixes: Sequence[str]) -> list[Path]:
    """Files of a folder and of all below, linked folders too, in the order of names.

    A folder that is met again, such as by a link to one above it, is not entered twice.

    Args:
        folder: where to look.
        suffixes: in small letters, with the point; capitals are taken as well.

    Raises:
        OSError: a folder cannot be listed.
    """

    def fail(error):
        raise error

    found, seen = [], set()
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Real folders before links, so that what is reached by both keeps its own name.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        found += [Path(place, name) for name in files if name.lower().endswith(tuple(suffixes))]
    return sorted(found)


def as_array(image) -> np.ndarray:
    """One image as (H, W, 3) uint8 RGB.

    Args:
        image: such an array, a PIL image, or a path.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_image`; or an array of another form.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        _load(image, None, "The image")
        return _to_rgb(image, "The image")
    if not (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size
    ):
        found = type(image).__name__
        if isinstance(image, np.ndarray):
            found = f"an array of {image.dtype} {image.shape}"
        raise ValueError(
            f"An image is a uint8 RGB array (H, W, 3), a PIL image or a path, not {found}."
        )
    return image


def resized_shape(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width at which a detector sees an image: Detectron2's ``ResizeShortestEdge``.

    The shorter side becomes ``min_size``, unless the longer would then exceed ``max_size``; 0 for
    ``min_size`` leaves the image as it is.

    Raises:
        ValueError: an image so narrow that nothing of it would be left.
    """
    if min_size == 0:
        return height, width
    scale = min_size / min(height, width)
    new_height, new_width = (
        (min_size, scale * width) if height < width else (scale * height, min_size)
    )
    if max(new_height, new_width) > max_size:
        scale = max_size / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    shape = int(new_height + 0.5), int(new_width + 0.5)
    if min(shape) < 1:
        raise ValueError(
            f"An image of {width}x{height} pixels is too narrow to be seen at {max_size} pixels; "
            "cut it into pieces."
        )
    return shape


def resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 at another height and width, by Pillow's bilinear filter as in training."""
    if image.shape[:2] == shape:
        return image
    return np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))


def _name(source) -> str:
    return "The image" if isinstance(source, bytes) else f"The image '{os.fspath(source)}'"


def _check_file(path, name) -> None:
    """Refuse what is no file: opening a pipe would wait for its other end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        raise FileNotFoundError(f"{name} does not exist; give an existing file.") from None
    if not stat.S_ISREG(mode):
        raise FileNotFoundError(f"{name} is no file but a folder, pipe or device; give a file.")


def _content(source, name, max_bytes) -> bytes:
    if isinstance(source, bytes):
        size = len(source)
    else:
        _check_file(source, name)
        size = os.path.getsize(source)
    if max_bytes is not None and size > max_bytes:
        raise ImageTooLarge(f"{name} has {size} bytes and at most {max_bytes} are read; shrink it.")
    if size == 0:
        raise ValueError(f"{name} cannot be read: it is empty; give an image.")
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}); restore it.") from error


def _open(source, name, max_pixels, formats) -> Image.Image:
    """An image whose header is read, of admitted format, pixels and cost."""
    if isinstance(source, bytes):
        if reason := _too_costly(source):
            raise ValueError(f"{name} {reason}; save it anew in a common form.")
        source = io.BytesIO(source)
    if formats is None:
        Image.init()
        formats = [known for known in Image.ID if known not in _NOT_PIXELS]
    # Whatever a decoder throws at damaged bytes is the image's fault, and Pillow throws many kinds.
    try:
        image = Image.open(source, formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(
            f"{name} has more pixels than the {max_pixels} that are decoded; shrink it."
        ) from error
    except Exception as error:
        asked = "an image" if len(formats) > 9 else "a JPEG, PNG, BMP, WebP or TIFF"
        raise ValueError(
            f"{name} cannot be read; give {asked} of at most {max_pixels} pixels that is whole."
        ) from error
    width, height = image.size
    if width * height <= max_pixels and min(width, height) > 0:
        return image
    image.close()
    if min(width, height) <= 0:
        raise ValueError(f"{name} has no pixels; restore it.")
    raise ImageTooLarge(
        f"{name} is {width}x{height} pixels and at most {max_pixels} pixels are decoded; shrink it."
    )


def _load(image, content, name) -> None:
    """Decode the pixels.

    Args:
        content: the encoded image where it is known; None for one that somebody else opened.
    """
    try:
        image.load()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name} cannot be read: it is cut short or damaged ({reason}); restore it."
        ) from error
    if content is not None and image.format in ("JPEG", "MPO"):
        # What a download leaves whose place was reserved is zeros, which Pillow takes for pixels.
        scan = next((end for kind, end in _jpeg_segments(content) if kind == 0xDA), 0)
        if content.find(b"\xff\xd9", scan) < 0:
            raise ValueError(
                f"{name} cannot be read: it is cut short (a JPEG without its end); restore it."
            )


def _check_depth(image, name) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise ValueError(
            f"{name} has {kind} values, for which there is no rule of how bright they are; "
            "save it with 8 or 16 bits."
        )


def _to_rgb(image, name) -> np.ndarray:
    """(H, W, 3) uint8 of a decoded image."""
    _check_depth(image, name)
    method = _TRANSPOSE.get(_orientation(image))
    try:
        if image.mode.startswith("I"):
            image = Image.fromarray(_eight_bits(image))
        if method is not None:
            image = image.transpose(method)
        if isinstance(image.info.get("transparency"), bytes):  # Pillow would warn that it is lost
            image = image.copy()
            del image.info["transparency"]
        return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise ValueError(f"{name} cannot be made RGB ({error}); save it as RGB.") from error


def _eight_bits(image) -> np.ndarray:
    """(H, W) uint8 of one with 16 bits or, where a TIFF says so, fewer."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    grey = (np.asarray(image) >> max(bits - 8, 0)).clip(0, 255).astype(np.uint8)
    # Pillow turns WhiteIsZero around for 8 bits alone.
    return 255 - grey if tags.get(262) == 0 else grey


def _orientation(image) -> int:
    """The orientation tag, 1 to 8; 1 where there is none that makes sense."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # tags that cannot be read say nothing; the pixels are whole
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _is_turned(image, name) -> bool:
    """Width and height swap between this open image's size and the image as it is read."""
    if image.format == "TIFF":  # Pillow swaps them itself
        return False
    if image.format == "PNG" and image.info.get("exif") is None and _has_late_chunks(image):
        _load(image, None, name)
    elif image.format == "PNG":
        # A PNG's own getexif decodes it to look behind the pixels, where nothing stands.
        try:
            return Image.Image.getexif(image).get(_ORIENTATION, 1) in (5, 6, 7, 8)
        except Exception:
            return False
    return _orientation(image) >= 5


def _has_late_chunks(image) -> bool:
    """Tell whether text or EXIF stands behind the pixels of an open PNG."""
    file, place = image.fp, image.fp.tell()
    try:
        file.seek(8)
        pixels = False
        for _ in range(MAX_CHUNKS):
            header = file.read(8)
            kind = header[4:]
            if len(header) < 8 or kind == b"IEND":
                return False
            pixels |= kind == b"IDAT"
            if pixels and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            file.seek(int.from_bytes(header[:4], "big") + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _too_costly(content: bytes) -> str:
    """Why an encoded image would take long for its size, and "" where it would not."""
    if content.startswith(b"\xff\xd8"):
        return _jpeg_cost(content)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_cost(content)
    if content.startswith((b"II", b"MM")):
        return _tiff_cost(content)
    if content.startswith(b"BM") and content[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        width, height = (abs(_signed(content[place : place + 4])) for place in (18, 22))
        if width * height > MAX_RLE_PIXELS or len(content) > MAX_RLE_BYTES:
            return (
                f"is a run-length encoded BMP of more than {MAX_RLE_PIXELS} pixels or "
                f"{MAX_RLE_BYTES} bytes"
            )
    return ""


def _signed(number: bytes) -> int:
    return int.from_bytes(number, "little", signed=True)


def _jpeg_cost(content):
    scans = segments = place = 0
    for kind, end in _jpeg_segments(content):
        if kind == 0xDA:
            # Counting what looks like one is fast and never too few.
            if not scans and content.count(b"\xff\xda", place) <= MAX_SCANS:
                return ""
            scans += 1
            if scans > MAX_SCANS:
                return f"has more than {MAX_SCANS} scans"
        elif not scans:
            segments += 16 if kind == 0xED else 1  # Photoshop's, whose parts Pillow reads singly
            if segments > MAX_SEGMENTS or end - place > 2**17:  # the second: filled by junk
                return f"has more than {MAX_SEGMENTS} segments in its header"
        place = end
    return ""


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Marker and end of each segment of a JPEG until its own end; of a scan that of its header."""
    place, pattern = 2, _MARKER
    while found := pattern.search(content, place):
        kind, place = content[found.start() + 1], found.end()
        if kind == 0xD9:
            return
        if kind not in _BARE_MARKERS:
            place += int.from_bytes(content[place : place + 2], "big")
        if place > len(content):
            return
        yield kind, place
        pattern = _MARKER_IN_SCAN if kind == 0xDA else _MARKER


def _png_cost(content):
    place, chunks, ancillary = 8, 0, 0
    while place + 8 <= len(content):
        kind = content[place + 4 : place + 8]
        chunks += 1
        ancillary += kind not in (b"IDAT", b"fdAT", b"fcTL")
        if chunks > MAX_CHUNKS:
            return f"has more than {MAX_CHUNKS} chunks"
        if ancillary > MAX_ANCILLARY_CHUNKS:
            return f"has more than {MAX_ANCILLARY_CHUNKS} chunks beside those of its pixels"
        if kind == b"IEND":
            break
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return ""


def _tiff_cost(content):
    order = "little" if content.startswith(b"II") else "big"

    def number(place, size):
        return int.from_bytes(content[place : place + size], order)

    wide = number(2, 2) == 43  # BigTIFF
    word = 8 if wide else 4
    directory = number(8 if wide else 4, word)
    entries = number(directory, 8 if wide else 2)
    first, step = directory + (8 if wide else 2), 12 + 2 * (word - 4)
    tile = 1
    for place in range(first, min(first + entries * step, len(content)), step):
        tag, kind, count = number(place, 2), number(place + 2, 2), number(place + 4, word)
        # Bytes and text, as profiles, may be long.
        if kind not in (1, 2, 6, 7) and count > MAX_TAG_VALUES:
            return f"has more than {MAX_TAG_VALUES} values in its tag {tag}"
        if tag in (322, 323):  # sides of a tile, which is decoded as a whole
            tile *= number(place + 4 + word, 2 if kind == 3 else 4)
            if tile > MAX_DATA_PIXELS:
                return f"has tiles of more than {MAX_DATA_PIXELS} pixels"
    return ""
