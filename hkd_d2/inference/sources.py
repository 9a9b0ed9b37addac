"""The inputs of a detector: pictures, folders of them, videos and cameras, frame by frame."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from hkd_d2.data.images import MAX_PIXELS, SUFFIXES, find_files, read_image

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")
CAMERA = "webcam"
# Ours. Frames a second where a video or camera does not tell.
DEFAULT_FPS = 25.0
# Ours. A video with a smaller share of the frames that its header counts was cut short; some
# headers estimate the number.
WHOLE = 0.95


@dataclass(frozen=True)
class Source:
    """One picture, video or camera.

    Attributes:
        place: file, or number of the camera.
        copy: where its annotated copy goes, relative to the folder of all copies; the suffix
            is that of a picture or a video that this project writes.
    """

    place: Path | int
    copy: Path

    @property
    def is_camera(self) -> bool:
        return isinstance(self.place, int)

    @property
    def is_video(self) -> bool:
        """A video or a camera."""
        return self.is_camera or self.place.suffix.lower() in VIDEOS

    def __str__(self):
        return f"{CAMERA}:{self.place}" if self.is_camera else str(self.place)

    def open(self) -> "Picture | Video":
        """Ready to be iterated over, once.

        Raises:
            FileNotFoundError, ValueError: it cannot be read; see :func:`read_image`.
        """
        return Video(self) if self.is_video else Picture(self)


class Picture:
    """One frame from an image file; no number of frames a second."""

    fps = None

    def __init__(self, source: Source):
        self.image = read_image(source.place)

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.image


class Video:
    """Frames of a video or camera, uint8 RGB (H, W, 3), turned as the video's own tag says.

    Attributes:
        num_frames: as its header counts them; None for a camera, or where not told.
        fps: frames a second.
    """

    def __init__(self, source: Source):
        """
        Raises:
            FileNotFoundError, ValueError: no such file, no video, or frames of too many pixels.
        """
        self.source = source
        if source.is_camera:
            self._capture = cv2.VideoCapture(source.place)
            advice = "connect a camera, or give the number of another, as webcam:1"
        else:
            # OpenCV would take a missing file for a URL or a pattern of names.
            if not source.place.is_file():
                raise FileNotFoundError(f"The video '{source}' does not exist; give a video file.")
            self._capture = cv2.VideoCapture(str(source.place), cv2.CAP_FFMPEG)
            advice = f"give one of {', '.join(VIDEOS)} that OpenCV's FFmpeg decodes"
        width, height = (
            self._capture.get(key) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        if not self._capture.isOpened() or width * height <= 0:
            self.close()
            what = "The camera" if source.is_camera else "The video"
            raise ValueError(f"{what} '{source}' cannot be read; {advice}.")
        if width * height > MAX_PIXELS:
            self.close()
            raise ValueError(
                f"The video '{source}' has frames of {width:.0f}x{height:.0f} pixels and at most "
                f"{MAX_PIXELS} pixels are decoded; shrink it."
            )
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.num_frames = int(count) if count > 0 and not source.is_camera else None
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else DEFAULT_FPS

    def __iter__(self) -> Iterator[np.ndarray]:
        """
        Raises:
            ValueError: after the last frame, if the video has none or was cut short, or if the
                camera stopped.
        """
        number = 0
        try:
            while True:
                there, frame = self._capture.read()
                if not there:
                    break
                number += 1
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        finally:
            self.close()
        if self.source.is_camera:
            raise ValueError(f"The camera '{self.source}' stopped after {number} frames.")
        if number < max(1, WHOLE * (self.num_frames or 0)):
            raise ValueError(
                f"The video '{self.source}' ends after {number} of {self.num_frames or 'some'} "
                "frames; restore it."
            )

    def close(self) -> None:
        self._capture.release()


def find_sources(inputs: Sequence[str], out: str | os.PathLike) -> tuple[list[Source], list[str]]:
    """Everything that the inputs name.

    Args:
        inputs: pictures, videos, folders (with all pictures and videos below, in linked folders
            too, but not in ``out``), ``webcam`` or ``webcam:<number>``.
        out: folder of the annotated copies.

    Returns:
        tuple: the sources, in the order of the inputs and of a folder's names, each once; and a
        sentence for each input that is none of these, and for each folder without any.

    Raises:
        ValueError: the copies would replace an input.
    """
    out = Path(out)
    places: dict[Path | int, Path] = {}  # to the copy's wished-for path
    refusals = []
    for text in inputs:
        path = Path(text)
        camera, _, number = text.partition(":")
        if camera == CAMERA and (number.isdecimal() or text == CAMERA):
            places.setdefault(int(number or 0), Path(f"{CAMERA}{number or 0}"))
        elif path.is_dir():
            try:
                files = find_files(path, SUFFIXES + VIDEOS)
            except OSError as error:
                refusals.append(
                    f"The folder '{text}' cannot be read ({error}); change its permissions."
                )
                continue
            found = [p for p in files if not p.resolve().is_relative_to(out.resolve())]
            for file in found:
                places.setdefault(file, Path(path.resolve().name, file.relative_to(path)))
            if not found:
                refusals.append(
                    f"The folder '{text}' has neither pictures ({', '.join(SUFFIXES)}) nor videos "
                    f"({', '.join(VIDEOS)}); name another."
                )
        elif not os.path.lexists(path):
            refusals.append(f"'{text}' does not exist; give a picture, video, folder or {CAMERA}.")
        elif path.suffix.lower() in SUFFIXES + VIDEOS:
            places.setdefault(path, Path(path.name))
        else:
            refusals.append(
                f"'{text}' is neither a picture ({', '.join(SUFFIXES)}) nor a video "
                f"({', '.join(VIDEOS)}); convert it."
            )
    sources, taken = [], set()
    for place, wish in places.items():
        source = Source(place, _free(wish, place, taken))
        if not source.is_camera and (out / source.copy).resolve() == place.resolve():
            raise ValueError(f"The copy of '{place}' would replace it; give another output folder.")
        taken.add(source.copy)
        sources.append(source)
    return sources, refusals


def _free(wish: Path, place: Path | int, taken: set[Path]) -> Path:
    """``wish`` with the suffix of what is written, numbered where another copy has its name."""
    if isinstance(place, int) or place.suffix.lower() in VIDEOS:
        suffix = ".mp4"
    else:
        suffix = wish.suffix if wish.suffix.lower() in (".jpg", ".jpeg") else ".png"
    stem = wish.name if isinstance(place, int) else wish.stem
    copy, number = wish.with_name(stem + suffix), 2
    while copy in taken:
        copy, number = wish.with_name(f"{stem}-{number}{suffix}"), number + 1
    return copy
