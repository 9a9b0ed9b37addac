"""MATLAB files, read by SciPy within a bound on what they unpack to."""

import os
import struct
import zlib
from typing import Any

# The largest published annotations unpack to a tenth of it.
MAX_BYTES = 2**28
_HEADER, _TAG, _COMPRESSED = 128, 8, 15
_CHUNK = 2**16


def read_mat(path: str | os.PathLike, variable: str) -> Any:
    """A variable of a MATLAB file of version 7 or older, as :func:`scipy.io.loadmat` has it.

    Raises:
        ValueError: the file unpacks to more than :data:`MAX_BYTES`.
        Exception: a dozen types of SciPy's, of a damaged file or one that lacks the variable.
    """
    import scipy.io  # on first use: scoring of other files needs NumPy alone

    if unpacked_size(path) > MAX_BYTES:
        raise ValueError(f"it unpacks to more than {MAX_BYTES >> 20} MiB")
    return scipy.io.loadmat(path, variable_names=[variable], appendmat=False)[variable]


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
