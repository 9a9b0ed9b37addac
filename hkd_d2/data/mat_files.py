"""MATLAB files, read by SciPy within a bound on what they unpack to."""

import os
import struct
import zlib
from typing import Any

# The largest published annotations unpack to a tenth of it.
MAX_BYTES = 2**28
_HEADER, _TAG, _COMPRESSED = 128, 8, 15
_CHUNK, _MATRIX, _MAX_DEPTH = 2**16, 14, 50
_KINDS = (*range(1, 8), 9, *range(12, 19))  # of elements, as the format numbers them


def read_mat(path: str | os.PathLike, variable: str) -> Any:
    """A variable of a MATLAB file of version 7 or older, as :func:`scipy.io.loadmat` has it.

    Raises:
        ValueError: the file unpacks to more than :data:`MAX_BYTES`.
        Exception: a dozen types of SciPy's, of a damaged file or one that lacks the variable.
    """
    import scipy.io  # on first use: scoring of other files needs NumPy alone

    if unpacked_size(path) > MAX_BYTES:
        raise ValueError(f"it unpacks to more than {MAX_BYTES >> 20} MiB")
    check_structure(path)
    return scipy.io.loadmat(path, variable_names=[variable], appendmat=False)[variable]


def check_structure(path: str | os.PathLike) -> None:
    """Check that the elements of a file of version 5 to 7 fill it and each other.

    SciPy trusts them: of a file in which a piece is missing it may end the process.

    Raises:
        ValueError: an element of no known type, or one that ends beyond its parent.
    """
    with open(path, "rb") as file:
        content = file.read()
    order = {b"IM": "<", b"MI": ">"}.get(content[_HEADER - 2 : _HEADER])
    if order:
        _check_elements(memoryview(content)[_HEADER:], struct.Struct(f"{order}2I"), 0)


def _check_elements(content: memoryview, tag: struct.Struct, depth: int) -> None:
    place = 0
    while place < len(content):
        if depth > _MAX_DEPTH or len(content) - place < _TAG:
            raise ValueError("its elements do not fit into each other")
        kind, size = tag.unpack_from(content, place)
        small = kind >> 16  # size and up to four bytes stand inside the tag
        if small:
            kind &= 0xFFFF
        end = place + _TAG if small else place + _TAG + size
        if kind not in _KINDS or small > 4 or end > len(content):
            raise ValueError("its elements do not fit into each other")
        if kind == _COMPRESSED:
            inner = zlib.decompressobj().decompress(content[place + _TAG : end], MAX_BYTES)
            _check_elements(memoryview(inner), tag, depth + 1)
        elif kind == _MATRIX and not small:
            _check_elements(content[place + _TAG : end], tag, depth + 1)
        place = end if kind == _COMPRESSED else end + -end % 8


def unpacked_size(path: str | os.PathLike) -> int:
    """Bytes that the compressed variables of a file unpack to, counted a little beyond
    :data:`MAX_BYTES` at most; 0 where it has none, or is no file of version 5 to 7."""
    total = 0
    with open(path, "rb") as file:
        order = {b"IM": "<", b"MI": ">"}.get(file.read(_HEADER)[-2:])
        while order and len(tag := file.read(_TAG)) == _TAG:
            kind, left = struct.unpack(f"{order}2I", tag)
            if kind != _COMPRESSED:
                file.seek(left, os.SEEK_CUR)
                continue
            stream = zlib.decompressobj()
            while left and not stream.eof:
                packed = file.read(min(left, _CHUNK))
                left -= len(packed)
                if not packed:
                    return total
                try:
                    while packed and not stream.eof:
                        total += len(stream.decompress(packed, _CHUNK))
                        packed = stream.unconsumed_tail
                        if total > MAX_BYTES:
                            return total
                except zlib.error:
                    return total
            file.seek(left, os.SEEK_CUR)
    return total
