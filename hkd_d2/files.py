"""Files that are written whole or not at all, and never over what a training run wrote."""

import contextlib
import errno
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

# What a training run keeps in its folder, beside its checkpoints.
OF_A_RUN = ("config.yaml", "last_checkpoint", "metrics.json", "log.txt")
_MOST_CODE = 1 << 26  # bytes of a program's code, which is compressed
_ENOUGH = 1 << 20  # bytes; with less a disk is full


@contextlib.contextmanager
def written_beside(path: str | Path, *, by_the_run: bool = False) -> Iterator[Path]:
    """Write a file beside its place; it gets its name when it is whole and on the disk.

    Whatever ends the block, nothing half-written has the name, and what had it before is
    untouched. A process that is killed leaves a folder that is called ``part-...``, which
    nothing reads.

    Args:
        path: where the file is to be; a link is followed, a device or pipe written directly.
        by_the_run: the caller is the training run whose folder this is.

    Yields:
        The path to write, of the same name and on the same disk.

    Raises:
        ValueError: the file belongs to a training run.
        OSError: it cannot be written; of a full disk and of a folder without permission one
            sentence.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    place = Path(os.path.realpath(path))
    if not by_the_run:
        check_not_of_a_run(place)
    # In a folder of its own, since PyTorch writes the file's name into its archives.
    folder = place.with_name(f"part-{secrets.token_hex(4)}")
    part = folder / place.name
    try:
        folder.mkdir()
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, place)
        folder.rmdir()
        _sync(place.parent)  # the name is on the disk as well
    except BaseException as error:
        full = _is_full(error, place.parent)  # before its bytes are given back
        shutil.rmtree(folder, ignore_errors=True)
        if full:
            free = shutil.disk_usage(place.parent).free / 1e6
            raise OSError(
                f"There is no room for '{path}' ({free:.1f} MB are free); make room or name "
                "another folder."
            ) from error
        if isinstance(error, OSError) and str(error.filename) in map(str, (folder, part)):
            raise type(error)(
                f"'{path}' cannot be written ({error.strerror}); name a folder that you may "
                "write to."
            ) from error
        raise


def write_text(path: str | Path, text: str, *, by_the_run: bool = False) -> None:
    """Write a text file in UTF-8 by :func:`written_beside`."""
    with written_beside(path, by_the_run=by_the_run) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def files_beside(folder: str | Path) -> Iterator[Path]:
    """Write several files of a folder; they get their names when all of them are whole.

    Files that the folder holds besides stay. Where it was not there, it is not there after a
    failure either.

    Yields:
        An empty folder to write into.

    Raises:
        ValueError, OSError: see :func:`written_beside`.
    """
    folder = Path(folder)
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    part = folder / f"part-{secrets.token_hex(4)}"
    try:
        part.mkdir(parents=True)
        yield part
        written = sorted(part.iterdir())
        for file in written:
            check_not_of_a_run(folder / file.name)
        for file in written:
            with written_beside(folder / file.name) as target:
                os.replace(file, target)
        part.rmdir()
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and str(error.filename) in map(str, (part, *made)):
            raise type(error)(
                f"The folder '{folder}' cannot be written ({error.strerror}); name one that you "
                "may write to."
            ) from error
        raise


def check_archive(path: str | Path) -> None:
    """Check a zip file of PyTorch before it is read.

    PyTorch writes checksums and does not compare them. It compresses programs' code alone, so an
    archive that unpacks to far more than its size is made to fill the memory.

    Raises:
        ValueError: it is damaged, or no archive as PyTorch writes them; a clause says why.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
            if size > os.path.getsize(path) + _MOST_CODE:
                raise ValueError(f"it unpacks to {size / 1e6:.0f} MB, far more than its size")
            damaged = archive.testzip()
    except ValueError:
        raise
    except Exception as error:  # zipfile raises many kinds on a damaged file
        raise ValueError(str(error) or type(error).__name__) from error
    if damaged:
        raise ValueError(f"'{damaged}' in it is damaged")


def is_of_a_run(folder: str | Path) -> bool:
    """Whether a training run wrote this folder."""
    return (Path(folder) / "last_checkpoint").exists()


def check_not_of_a_run(path: Path) -> None:
    """Check that writing ``path`` replaces nothing that a training run wrote.

    Raises:
        ValueError: it would.
    """
    run = path.exists() and is_of_a_run(path.parent)
    if run and (path.name in OF_A_RUN or path.suffix == ".pth"):
        raise ValueError(
            f"'{path}' belongs to the training run in '{path.parent}'; name another file or folder."
        )


def remove_unfinished(folder: str | Path) -> list[str]:
    """Remove what processes that were killed left half-written in a folder.

    Returns:
        The names of the files that they were writing.
    """
    found = []
    for part in Path(folder).glob("part-" + "[0-9a-f]" * 8):
        found += sorted(p.name for p in part.iterdir())
        shutil.rmtree(part, ignore_errors=True)
    return found


def _sync(folder):
    with contextlib.suppress(OSError):  # not every file system knows it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_full(error, folder):
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # PyTorch's writers raise RuntimeErrors of their own.
    with contextlib.suppress(OSError):
        return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < _ENOUGH
    return False
