"""Images from files, bytes and arrays, within bounds, and the size at which a detector sees them.

Everything here may be given what a stranger sent: nothing is decoded before its size is known.
"""

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

# Bounds of one encoded image, ours: a photograph of 50 megapixels has some 30 MB as JPEG.
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
# Pillow knows many more, some of them through programs of their own.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
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


class ImageTooLarge(ValueError):
    """An image beyond the bounds, which may well be whole."""


def read_image(
    source: str | Path | bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode one image, turned as its EXIF orientation says.

    Bytes are decoded where they are: no file is opened for them. Of several frames the first is
    taken; transparency is dropped.

    Args:
        source: path of an image, or its encoded bytes: JPEG, PNG, BMP, WebP or TIFF.
        max_bytes: most bytes of the encoded image.
        max_pixels: most pixels of the decoded image.

    Returns:
        ndarray: (H, W, 3) uint8, RGB.

    Raises:
        FileNotFoundError: no such file.
        ImageTooLarge: a ValueError, too many bytes or pixels.
        ValueError: another format, cut short, or damaged.
    """
    if isinstance(source, bytes):
        name, size = "The image", len(source)
    else:
        name = f"The image '{source}'"
        if not os.path.isfile(source):
            raise FileNotFoundError(f"{name} does not exist; give an existing file.")
        size = os.path.getsize(source)
    if size > max_bytes:
        raise ImageTooLarge(f"{name} has {size} bytes and at most {max_bytes} are read; shrink it.")
    if not isinstance(source, bytes):
        source = Path(source).read_bytes()
    # Whatever a decoder throws at damaged bytes is the image's fault, and Pillow throws many kinds.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our bound is below
            image = Image.open(io.BytesIO(source), formats=FORMATS)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read; give a JPEG, PNG, BMP, WebP or TIFF of at most {max_pixels} "
            "pixels."
        ) from error
    with image:
        if image.width * image.height > max_pixels:
            raise ImageTooLarge(
                f"{name} is {image.width}x{image.height} pixels and at most {max_pixels} pixels "
                "are decoded; shrink it."
            )
        try:
            image.load()
            pixels = upright(image).convert("RGB")
        except Exception as error:
            raise ValueError(f"{name} is cut short or damaged ({error}); send it again.") from error
    return np.asarray(pixels)


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF orientation says, as Detectron2 does."""
    try:
        method = _TRANSPOSE.get(image.getexif().get(_ORIENTATION))
    except Exception:  # tags that cannot be read say nothing; the pixels are whole
        method = None
    return image if method is None else image.transpose(method)


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
        return np.asarray(upright(image).convert("RGB"))
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
