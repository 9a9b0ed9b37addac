"""Annotated copies and COCO files of pictures, videos and a camera."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from helpers.red_detector import RedDetector, street, write_video
from helpers.rules import rule
from hkd_d2.data.images import resized_shape
from hkd_d2.inference.annotate import annotate
from hkd_d2.inference.drawing import draw_boxes
from hkd_d2.inference.sources import find_sources

pytestmark = rule("The demo goes on past what it cannot read, says so, and replaces no input")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(street()).save("a.png")
    Path("broken.jpg").write_bytes(b"no picture")
    Image.fromarray(street(x=90, y=5)).save("b.png")
    write_video("walk.mp4")


def run(inputs, detectors=None, **options):
    sources, refusals = find_sources(inputs, "out")
    assert not refusals
    said = []
    detectors = detectors or {"one": RedDetector()}
    options = {"threshold": 0.5, **options}
    return annotate(sources, detectors, Path("out"), say=said.append, **options), said


def test_pictures_and_the_unreadable_between_them():
    summary, said = run(["a.png", "broken.jpg", "b.png"])
    assert (summary.frames, summary.refusals, summary.interrupted) == (2, 1, False)
    assert len(said) == 1 and "'broken.jpg' cannot be read" in said[0]
    assert summary.written == [Path("out", n) for n in ("a.png", "b.png", "detections.json")]
    wanted = draw_boxes(street(), RedDetector().detect([street()])[0])
    np.testing.assert_array_equal(np.asarray(Image.open("out/a.png")), wanted)
    coco = COCO("out/detections.json")
    assert [image["file_name"] for image in coco.loadImgs([1, 2])] == ["a.png", "b.png"]
    assert coco.loadCats([1]) == [{"id": 1, "name": "pedestrian"}]
    first, second = coco.loadAnns([1, 2])
    assert (first["image_id"], first["bbox"]) == (1, [40, 20, 20, 50])
    assert (second["image_id"], second["bbox"]) == (2, [90, 5, 20, 50])
    assert first["area"] == 1000 and first["score"] == pytest.approx(0.9)
    assert coco.imgs[1]["height"] == 96 and coco.imgs[1]["width"] == 128


def test_the_threshold_is_of_what_is_drawn():
    run(["a.png"], threshold=0.95)
    np.testing.assert_array_equal(np.asarray(Image.open("out/a.png")), street())
    assert len(json.loads(Path("out/detections.json").read_text())["annotations"]) == 1


def test_several_detectors_side_by_side():
    names = ("rider", "walker")
    detectors = {"teacher": RedDetector(), "student": RedDetector(0.3, names)}
    summary, _ = run(["a.png"], detectors)
    assert Image.open("out/a.png").width > 2 * 128
    assert [p.name for p in summary.written] == [
        "a.png",
        "detections_teacher.json",
        "detections_student.json",
    ]
    student = json.loads(Path("out/detections_student.json").read_text())
    assert student["annotations"][0]["category_id"] == 2
    assert [c["name"] for c in student["categories"]] == ["rider", "walker"]


def read_video(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (frame := capture.read())[0]:
        frames.append(frame[1][..., ::-1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.mark.parametrize("max_frames", [None, 5])
def test_a_video_frame_by_frame(max_frames):
    summary, said = run(["walk.mp4"], max_frames=max_frames)
    number = max_frames or 12
    assert (summary.frames, said) == (number, [])
    frames, fps = read_video("out/walk.mp4")
    assert len(frames) == number and fps == 10 and frames[0].shape == (96, 128, 3)
    content = json.loads(Path("out/detections.json").read_text())
    assert [i["frame"] for i in content["images"]] == list(range(number))
    assert content["images"][3]["time"] == pytest.approx(0.3)
    # The pedestrian walks a pixel a frame.
    left = [a["bbox"][0] for a in content["annotations"]]
    np.testing.assert_allclose(left, 20 + np.arange(number), atol=1)
    red, _, blue = frames[2][40:50, 28:36].mean(axis=(0, 1))
    assert red > 150 and blue < 100


def test_a_video_cut_short_is_told_and_the_work_goes_on(monkeypatch):
    open_capture = cv2.VideoCapture

    class Counting:  # whose header counts 40 frames; OpenCV's own class bears no subclass
        def __init__(self, *arguments):
            self.capture = open_capture(*arguments)
            self.read, self.release = self.capture.read, self.capture.release
            self.isOpened = self.capture.isOpened

        def get(self, key):
            return 40 if key == cv2.CAP_PROP_FRAME_COUNT else self.capture.get(key)

    monkeypatch.setattr("hkd_d2.inference.sources.cv2.VideoCapture", Counting)
    summary, said = run(["walk.mp4", "a.png"])
    assert summary.refusals == 1 and "ends after 12 of 40 frames" in said[0]
    assert summary.frames == 13 and Path("out/walk.mp4").exists() and Path("out/a.png").exists()


class Camera:
    """A camera of ten frames a second that never ends."""

    sizes = {
        cv2.CAP_PROP_FRAME_WIDTH: 128,
        cv2.CAP_PROP_FRAME_HEIGHT: 96,
        cv2.CAP_PROP_FPS: 10,
        cv2.CAP_PROP_FRAME_COUNT: -1,
    }

    def __init__(self, number):
        assert number == 0
        self.get = self.sizes.get

    def isOpened(self):
        return True

    def read(self):
        return True, street()[..., ::-1].copy()

    def release(self):
        pass


def test_a_camera_keeps_to_the_clock(monkeypatch):
    folder = Path.cwd()
    monkeypatch.setattr("hkd_d2.inference.sources.cv2.VideoCapture", Camera)
    clock = iter(np.arange(0, 60, 0.3))  # a detector of 0.3 s before a camera of 10 frames a second
    ticks = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("hkd_d2.inference.annotate.time", ticks)
    summary, said = run(["webcam"], max_frames=20)
    assert summary.frames == 20 and said == []
    monkeypatch.undo()
    frames, fps = read_video(folder / "out/webcam0.mp4")
    assert fps == 10 and len(frames) == 60  # 6 s
    assert json.loads((folder / "out/detections.json").read_text())["images"][0]["file_name"] == (
        "webcam:0"
    )


def test_odd_sides_of_a_video_are_kept(monkeypatch):
    class Odd(Camera):  # OpenCV writes no video of odd sides to read
        sizes = Camera.sizes | {cv2.CAP_PROP_FRAME_WIDTH: 127, cv2.CAP_PROP_FRAME_HEIGHT: 95}

        def read(self):
            return True, street(size=(95, 127))[..., ::-1].copy()

    folder = Path.cwd()
    monkeypatch.setattr("hkd_d2.inference.sources.cv2.VideoCapture", Odd)
    clock = iter(np.arange(0, 60, 0.1))
    ticks = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("hkd_d2.inference.annotate.time", ticks)
    run(["webcam"], max_frames=3)
    monkeypatch.undo()
    frames, _ = read_video(folder / "out/webcam0.mp4")
    assert len(frames) == 3 and frames[0].shape == (96, 128, 3)


def test_ctrl_c_writes_what_was_done(monkeypatch):
    detector = RedDetector()
    detect = detector.detect

    def until_the_fourth(images):
        if len(detector.images) == 3:
            raise KeyboardInterrupt
        return detect(images)

    detector.detect = until_the_fourth
    summary, _ = run(["a.png", "walk.mp4", "b.png"], {"one": detector})
    assert summary.interrupted and summary.frames == 3
    assert len(read_video("out/walk.mp4")[0]) == 2
    assert len(json.loads(Path("out/detections.json").read_text())["images"]) == 3
    assert [p.name for p in summary.written] == ["a.png", "walk.mp4", "detections.json"]


def test_a_copy_that_cannot_be_written_stops_the_work():
    Path("out").mkdir()
    Path("out/a.png").mkdir()
    with pytest.raises(OSError):
        run(["a.png", "b.png"])


def test_a_frame_that_cannot_be_searched_is_named_and_the_rest_goes_on():
    Image.new("RGB", (2000, 1)).save("line.png")
    detector = RedDetector()
    detect = detector.detect

    def refuse_lines(images):
        for image in images:
            resized_shape(*image.shape[:2], 600, 900)
        return detect(images)

    detector.detect = refuse_lines
    summary, said = run(["a.png", "line.png", "b.png"], {"one": detector})
    assert (summary.frames, summary.refusals) == (2, 1)
    assert len(said) == 1 and "'line.png'" in said[0] and "2000x1 pixels is too narrow" in said[0]
    assert [p.name for p in summary.written] == ["a.png", "b.png", "detections.json"]
    assert not Path("out/line.png").exists()
