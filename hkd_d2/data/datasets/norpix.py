"""Norpix sequences (``.seq``) of JPEG frames, in which Caltech and KAIST publish their videos.

Little-endian. A header of 1024 bytes: 0xFEED (uint32), "Norpix seq" and two zeros (UTF-16, 24
bytes), version (int32), size of the header (uint32), description (UTF-16, 512 bytes), then nine
uint32: width, height, bits per pixel, bits per channel, bytes of an uncompressed image, image
format, number of frames, 0, bytes of an uncompressed frame; frame rate (float64); zeros. The image
formats 102 (grey or of a colour camera) and 201 (colour) are JPEG.

A frame is the number of its bytes, these four included (uint32), a JPEG file, and the time: seconds
(uint32), milliseconds (uint16) and two bytes. Some writers put eight empty bytes after that.

Source: pdollar/toolbox, videos/seqReaderPlugin.m (70e23ea), which tells the empty bytes by a zero
where the second frame's size would be.
"""

import os
import struct

JPEG_FORMATS = (102, 201)
HEADER = 1024
_FIELDS = struct.Struct("<9Id")
_FIELDS_AT = 4 + 24 + 4 + 4 + 512
_TIME, _EMPTY = 8, 8


class NorpixSequence:
    """A sequence of JPEG frames, opened for reading; a context manager.

    Attributes:
        width, height (int): pixels.
        length (int): number of frames that the header states, 0 where it states none.
        fps (float): frames a second that the header states.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no Norpix sequence of JPEG frames.
    """

    def __init__(self, path: str):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such video; unpack the .seq files there.")
        self.path = path
        self._file = open(path, "rb")
        try:
            self._read_header()
        except ValueError:
            self._file.close()
            raise
        self._bytes = os.path.getsize(path)
        self._starts = [HEADER]  # of the frames that are known, where the next is looked for
        self._gap = None  # bytes between a JPEG's end and the next frame

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def frame(self, index: int) -> bytes:
        """The JPEG file of frame ``index``, counted from 0, byte by byte as stored.

        Raises:
            IndexError: a negative index.
            ValueError: the file ends before the frame does, or the frame is no JPEG.
        """
        if index < 0:
            raise IndexError(f"{self.path}: frames are counted from 0, not {index}.")
        while len(self._starts) <= index:
            self._find_next()
        start = self._starts[index]
        size = self._frame_size(index)
        self._file.seek(start + 4)
        data = self._file.read(size - 4)
        if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
            raise ValueError(
                f"{self.path}: frame {index} is no whole JPEG; the file is damaged, fetch it again."
            )
        return data

    def _read_header(self) -> None:
        header = self._file.read(HEADER)
        name = "Norpix seq".encode("utf-16-le")
        if len(header) < HEADER or header[:4] != b"\xed\xfe\0\0" or header[4 : 4 + 20] != name:
            raise ValueError(
                f"{self.path}: no Norpix sequence (.seq); the file is damaged, fetch it again."
            )
        (size,) = struct.unpack_from("<I", header, 32)
        fields = _FIELDS.unpack_from(header, _FIELDS_AT)
        self.width, self.height, _, _, _, form, self.length, _, _, self.fps = fields
        if size != HEADER or form not in JPEG_FORMATS:
            raise ValueError(
                f"{self.path}: a header of 1024 bytes and image format 102 or 201 (JPEG) are "
                f"expected, not {size} and {form}; use the sequences as published."
            )

    def _frame_size(self, index: int) -> int:
        """Bytes of a frame whose start is known, its size field included."""
        start = self._starts[index]
        self._file.seek(start)
        field = self._file.read(4)
        size = struct.unpack("<I", field)[0] if len(field) == 4 else 0
        if size <= 4 or start + size > self._bytes:
            stated = f" of the {self.length} that its header states" if self.length else ""
            raise ValueError(
                f"{self.path}: frame {index} is not there or cut short{stated}; the file is "
                "truncated, fetch it again."
            )
        return size

    def _find_next(self) -> None:
        end = self._starts[-1] + self._frame_size(len(self._starts) - 1)
        if self._gap is None:
            self._file.seek(end + _TIME)
            self._gap = _TIME if self._file.read(4) != bytes(4) else _TIME + _EMPTY
        self._starts.append(end + self._gap)
