"""The images of a folder, and a look at every image of a data set before hours are spent on it.

What a picture is, is decided by :mod:`hkd_d2.data.images`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import PIL
from tqdm import tqdm

from hkd_d2.data.images import (
    MAX_DATA_PIXELS,
    SUFFIXES,
    check_image,
    find_files,
    image_size,
    is_turned,
    resized_shape,
)

__all__ = [
    *("SUFFIXES", "check_image_files", "find_images", "image_size", "resize_sizes"),
    *("size_sentence", "usable_records"),
]

# Changes with what the check looks at, so that files are looked at again.
_CHECK = f"2 {PIL.__version__}"
_LINE = re.compile(r"(\d+) (\d+) ([0-9a-f]{32})")


def check_image_files(
    records: list[dict], name: str, sizes: Sequence[tuple[int, int]] = ()
) -> None:
    """Check that each image can be read to its end and has the stated size.

    Every image is decoded, once: what passed is remembered by path, size and time of change in
    ``$HKD_D2_CACHE`` (see :mod:`hkd_d2.data.cache`).

    Args:
        records: Detectron2 records.
        name: the data set, for the sentence.
        sizes: shorter and longest side, pixels, to which the images are going to be resized, see
            :func:`hkd_d2.data.images.resized_shape`; nothing may vanish.

    Raises:
        ValueError: names the first file that fails, and what is wrong with it.
    """
    for fault in _faults(records, sizes):
        if fault:
            raise ValueError(f"{name}: {fault}")


def usable_records(
    records: list[dict], sizes: Sequence[tuple[int, int]], say: Callable[[str], None]
) -> list[dict]:
    """The records whose images pass; ``say`` gets a sentence for each of the others.

    Args:
        records, sizes: see :func:`check_image_files`.
        say: called with one sentence that names the file.
    """
    usable = []
    for record, fault in zip(records, _faults(records, sizes), strict=True):
        if fault:
            say(fault[0].upper() + fault[1:])
        else:
            usable.append(record)
    return usable


def find_images(folder: str, say: Callable[[str], None] | None = None) -> list[dict]:
    """Records, without annotations, of the images in a folder and below, in the order of names.

    Linked folders are followed, each once.

    Args:
        folder: where the images are.
        say: told a sentence for each image whose header cannot be read, which is left out.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: an image whose header cannot be read, without ``say``.
    """
    files = find_files(folder, SUFFIXES) if os.path.isdir(folder) else []
    if not files:
        raise FileNotFoundError(
            f"'{folder}' is no folder with images ({', '.join(SUFFIXES)}); name the folder of the "
            "images."
        )
    records = []
    for number, path in enumerate(files, 1):
        try:
            height, width = image_size(path)
        except (ValueError, FileNotFoundError) as error:  # the latter of a broken link or a pipe
            if say is None:
                raise ValueError(str(error)) from error
            say(str(error))
            continue
        records.append(
            {"file_name": str(path), "image_id": number, "width": width, "height": height}
        )
    return records


def resize_sizes(cfg, is_train: bool) -> list[tuple[int, int]]:
    """Shorter and longest sides, pixels, to which a config resizes images in training or test."""
    if is_train:
        return [(size, cfg.INPUT.MAX_SIZE_TRAIN) for size in cfg.INPUT.MIN_SIZE_TRAIN]
    return [(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]


def size_sentence(path: str, stated: tuple[int, int], size: tuple[int, int]) -> str:
    """Say that an image is not of the size of its annotation.

    Args:
        stated, size: (height, width) of the annotation, and as the image is read.
    """
    turn = ""
    if is_turned(path):
        turn = f" as it is read (its EXIF orientation turns the stored {size[0]}x{size[1]})"
    return (
        f"the image '{path}' is {size[1]}x{size[0]} pixels{turn} and its annotation says "
        f"{stated[1]}x{stated[0]}; correct the annotation or restore the image."
    )


def _faults(records, sizes) -> Iterator[str]:
    """The fault of each record's image as a sentence, "" where there is none."""
    known, new = _recall(), []

    def look(record):
        path = record["file_name"]
        try:
            key = _key(path)
            size = known.get(key)
            if size is None:
                size = check_image(path, max_pixels=MAX_DATA_PIXELS)
                new.append(f"{size[0]} {size[1]} {key}\n")
        except (ValueError, OSError) as error:
            sentence = str(error)
            return sentence[0].lower() + sentence[1:]
        stated = record.get("height", size[0]), record.get("width", size[1])
        if size != stated:
            return size_sentence(path, stated, size)
        for min_size, max_size in sizes:
            try:
                resized_shape(*size, min_size, max_size)
            except ValueError:
                return (
                    f"the image '{path}' is {size[1]}x{size[0]} pixels, of which nothing is left "
                    f"when its longer side is resized to {max_size}; cut or remove it."
                )
        return ""

    try:
        with ThreadPoolExecutor() as pool:
            found = pool.map(look, records)
            yield from tqdm(
                found, "checking", len(records), unit="image", delay=2, leave=False, disable=None
            )
    finally:
        _remember(new)


def _key(path: str) -> str | None:
    """Of a file as it is now; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    stamp = f"\0{status.st_size}\0{status.st_mtime_ns}\0{_CHECK}".encode()
    return hashlib.blake2b(os.fsencode(os.path.abspath(path)) + stamp, digest_size=16).hexdigest()


def _memory() -> str:
    from hkd_d2.data.cache import cache_folder  # which reads images' sizes from here

    return os.path.join(cache_folder(), "checked_images.txt")


def _recall() -> dict[str, tuple[int, int]]:
    """(height, width) as read of each file that passed, by key."""
    try:
        with open(_memory(), encoding="ascii", errors="replace") as file:
            found = map(_LINE.fullmatch, file.read().splitlines())
    except OSError:
        return {}
    return {line[3]: (int(line[1]), int(line[2])) for line in found if line}


def _remember(lines: list[str]) -> None:
    if not lines:
        return
    path = _memory()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab", buffering=0) as file:  # one write, which others' do not cut
            file.write("".join(lines).encode())
    except OSError:
        pass  # the next run looks again
