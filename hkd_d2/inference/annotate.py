"""Annotated copies of pictures and videos, and the detections on them as COCO JSON."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from hkd_d2.files import write_text, written_beside
from hkd_d2.inference.detections import Detections
from hkd_d2.inference.detector import Detector
from hkd_d2.inference.drawing import draw_side_by_side
from hkd_d2.inference.sources import Source

JPEG_QUALITY = 95
CODEC = "mp4v"  # MPEG-4 part 2, which every build of OpenCV writes


@dataclass
class Summary:
    """The outcome for all sources.

    Attributes:
        written: copies, then COCO files.
        frames: frames that were looked at.
        refusals: sources that could not be read, or not to their end.
        interrupted: by Ctrl-C; what was done until then is written.
    """

    written: list[Path] = field(default_factory=list)
    frames: int = 0
    refusals: int = 0
    interrupted: bool = False


def annotate(
    sources: Sequence[Source],
    detectors: Mapping[str, Detector],
    out: Path,
    *,
    threshold: float,
    max_frames: int | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> Summary:
    """Draw what detectors find on every source, and write it down.

    Into ``out`` go the copies, with the detectors side by side where there are several, and for
    each detector ``detections_<name>.json`` (``detections.json`` of a single one): a COCO data set
    with all its detections, each with its ``score``. An image out of a video has ``frame`` (from 0)
    and ``time`` (seconds) beside its file's name.

    Args:
        sources: see :func:`find_sources`.
        detectors: by name.
        out: folder; made where missing.
        threshold: detections that score more are drawn.
        max_frames: of each source; None for all, of a camera until Ctrl-C.
        say: told a sentence for each source that cannot be read; the work goes on.

    Raises:
        OSError: a copy cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    records = {name: _CocoRecord(detector.class_names) for name, detector in detectors.items()}
    summary = Summary()

    def refuse(sentence):
        say(sentence)
        summary.refusals += 1

    with tqdm(total=_count_frames(sources, max_frames), unit="frame", disable=None) as progress:
        try:
            for source in sources:
                copy = out / source.copy
                with contextlib.closing(_Copy(copy, source)) as writer:
                    frames = _read(source, refuse)
                    for number, (frame, fps) in enumerate(itertools.islice(frames, max_frames)):
                        try:
                            found = {n: d.detect([frame])[0] for n, d in detectors.items()}
                        except ValueError as error:  # a frame that no detector can be shown
                            refuse(f"'{source}' is left out: {error}")
                            break
                        origin = {"frame": number, "time": number / fps} if fps else {}
                        for name, record in records.items():
                            record.add(str(source), frame.shape, found[name], origin)
                        drawn = {n: f.above(threshold) for n, f in found.items()}
                        writer.write(draw_side_by_side(frame, drawn), fps)
                        summary.frames += 1
                        progress.update()
                    frames.close()
                if writer.frames:
                    summary.written.append(copy)
        except KeyboardInterrupt:
            summary.interrupted = True
            if writer.frames:
                summary.written.append(copy)
    for name, record in records.items():
        path = out / ("detections.json" if len(records) == 1 else f"detections_{name}.json")
        write_text(path, json.dumps(record.content(), allow_nan=False))
        summary.written.append(path)
    return summary


def _read(source, refuse) -> Iterator[tuple[np.ndarray, float | None]]:
    """Frames with the frames a second; what cannot be read is refused, here and nowhere else."""
    try:
        opened = source.open()
        for frame in opened:
            yield frame, opened.fps
    except (ValueError, OSError) as error:
        refuse(str(error))


def _count_frames(sources, max_frames) -> int | None:
    """For the progress bar; None where a source does not tell."""
    total = 0
    for source in sources:
        count = 1
        if source.is_camera:
            count = max_frames
        elif source.is_video:
            try:
                with contextlib.closing(source.open()) as video:
                    count = video.num_frames
            except (ValueError, OSError):  # refused when its turn comes
                count = 0
            if count and max_frames:
                count = min(count, max_frames)
        if count is None:
            return None
        total += count
    return total


class _Copy:
    """The annotated copy of one source: a picture, or a video frame by frame."""

    def __init__(self, path: Path, source: Source):
        self.path, self.source = path, source
        self.frames = 0
        self._video = None
        self._start = time.monotonic()

    def write(self, image: np.ndarray, fps: float | None) -> None:
        """
        Args:
            image: (H, W, 3) uint8 RGB.
            fps: of the video; None for a picture.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fps is None:
            with written_beside(self.path) as part:
                Image.fromarray(image).save(part, quality=JPEG_QUALITY)
            self.frames = 1
            return
        # The codec takes even sides, and OpenCV would cut the odd row off.
        image = np.pad(image, [(0, side % 2) for side in image.shape[:2]] + [(0, 0)], mode="edge")
        if self._video is None:
            code = cv2.VideoWriter_fourcc(*CODEC)
            self._video = cv2.VideoWriter(str(self.path), code, fps, image.shape[1::-1])
            if not self._video.isOpened():
                raise OSError(f"'{self.path}' cannot be written; look at the folder's free space.")
        times = 1
        if self.source.is_camera:  # detection may be slower than the camera: keep to the clock
            times = max(round((time.monotonic() - self._start) * fps) - self.frames, 0)
        for _ in range(times):
            self._video.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        self.frames += times

    def close(self) -> None:
        if self._video is not None:
            self._video.release()


class _CocoRecord:
    """Detections of one detector as a COCO data set."""

    def __init__(self, class_names):
        self.categories = [{"id": i, "name": name} for i, name in enumerate(class_names, 1)]
        self.images, self.annotations = [], []

    def add(self, file_name: str, shape: tuple, found: Detections, origin: dict) -> None:
        size = {"height": shape[0], "width": shape[1]}
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": file_name, **size, **origin})
        rows = zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True)
        for (x1, y1, x2, y2), score, label in rows:
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "score": score,
                }
            )

    def content(self) -> dict:
        return {
            "info": {"description": "detections of hkd_d2"},
            "images": self.images,
            "categories": self.categories,
            "annotations": self.annotations,
        }
