"""The images of a folder, and a look at every image of a data set before hours are spent on it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

# Suffixes of what counts as an image in a folder.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_JPEG_END = b"\xff\xd9"  # does not occur in a scan


def check_image_files(records: list[dict], name: str) -> None:
    """Check that each image exists, has the stated size, is whole, and is not corrupt.

    A PNG's checksums are verified, which reads the file without decoding it; a JPEG has none, so
    its header is looked at, and whether an end follows; what stands after the end is not.

    Args:
        records (list[dict]): Detectron2 records.
        name (str): the data set, for the sentence.

    Raises:
        ValueError: names the first file that fails, and what is wrong with it.
    """
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda record: _check(record, name), records):
            pass


def find_images(folder: str) -> list[dict]:
    """Records, without annotations, of the images in a folder and below, in the order of names.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: an image whose header cannot be read.
    """
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(
            f"'{folder}' is no folder with images ({', '.join(SUFFIXES)}); name the folder of the "
            "images."
        )
    records = []
    for number, path in enumerate(files, 1):
        height, width = image_size(path)
        records.append(
            {"file_name": str(path), "image_id": number, "width": width, "height": height}
        )
    return records


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of an image as Detectron2 reads it, from the header alone.

    Raises:
        ValueError: the header cannot be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (width, height) if _is_turned(image) else (height, width)
    except OSError as error:
        raise ValueError(
            f"The image '{path}' cannot be read ({error}); restore it or remove it."
        ) from error


def _is_turned(image: Image.Image) -> bool:
    """Whether an orientation tag turns a camera's picture by 90 degrees, as reading it will."""
    # A PNG's own getexif decodes the picture to look behind it.
    return Image.Image.getexif(image).get(0x0112, 1) >= 5


def _is_cut_jpeg(path: str) -> bool:
    with open(path, "rb") as f:
        JpegImageFile(f)  # stops at the scan; a thumbnail before it has an end of its own
        scan = f.tell()
        for place in (max(scan, os.path.getsize(path) - 64), scan):  # mostly it is near the end
            f.seek(place)
            if _JPEG_END in f.read():
                return False
    return True


def _check(record: dict, name: str) -> None:
    path = record["file_name"]
    try:
        with Image.open(path) as image:
            size, form, turned = image.size, image.format, _is_turned(image)
            image.verify()
    except (OSError, SyntaxError) as error:  # Pillow's word for a broken PNG is SyntaxError
        raise ValueError(
            f"{name}: the image '{path}' cannot be read ({error}); restore it or remove it from "
            "the annotations."
        ) from error
    stated = (record.get("width", size[0]), record.get("height", size[1]))
    if (size[::-1] if turned else size) != stated:
        raise ValueError(
            f"{name}: the image '{path}' is {size[0]}x{size[1]} pixels and its annotation says "
            f"{stated[0]}x{stated[1]}; correct the annotation or restore the image."
        )
    if form in ("JPEG", "MPO") and _is_cut_jpeg(path):  # MPO: a JPEG with further ones behind it
        raise ValueError(
            f"{name}: the image '{path}' is cut short; restore it or remove it from the "
            "annotations."
        )
