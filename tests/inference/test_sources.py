"""Inputs of a demo: what is found, what is refused, and where the copies go."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.red_detector import street, write_video
from helpers.rules import rule
from hkd_d2.inference.sources import Source, find_sources

pytestmark = rule("The demo goes on past what it cannot read, says so, and replaces no input")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in/deep").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/a.jpg", "deep/c.bmp"):
        Image.fromarray(street()).save(Path("in", name))
    Path("in/notes.txt").write_text("no picture")
    write_video("in/walk.mp4")
    return tmp_path


def copies(inputs, out="out"):
    sources, refusals = find_sources(inputs, out)
    assert refusals == []
    return [(str(s), str(s.copy)) for s in sources]


def test_a_folder_keeps_its_form(folder):
    assert copies(["in"]) == [
        ("in/a.JPG", "in/a.JPG"),
        ("in/b.png", "in/b.png"),
        ("in/deep/a.jpg", "in/deep/a.jpg"),
        ("in/deep/c.bmp", "in/deep/c.png"),
        ("in/walk.mp4", "in/walk.mp4"),
    ]
    # however it is named, the copies stay below the output folder
    (folder / "in/deep").resolve()
    assert [copy for _, copy in copies(["in/deep/.."])] == [copy for _, copy in copies(["in"])]


def test_files_and_cameras_and_names_that_clash(folder):
    inputs = ["in/deep/a.jpg", "in/b.png", "in/deep/c.bmp", "in/walk.mp4", "webcam", "webcam:2"]
    found = copies(inputs)
    assert [copy for _, copy in found] == [
        "a.jpg",
        "b.png",
        "c.png",
        "walk.mp4",
        "webcam0.mp4",
        "webcam2.mp4",
    ]
    assert found[-1][0] == "webcam:2"
    Path("d").mkdir()
    for name in ("d/b.png", "d/b.bmp"):
        Image.fromarray(street()).save(name)
    assert [c for _, c in copies(["in/b.png", "d/b.bmp", "d/b.png", "in/b.png"])] == [
        "b.png",
        "b-2.png",
        "b-3.png",
    ]


def test_what_is_refused(folder):
    Path("empty").mkdir()
    inputs = ["nowhere.png", "in/notes.txt", "empty", "http://host/a.mp4", "in/b.png", "webcam:x"]
    sources, refusals = find_sources(inputs, "out")
    assert [str(s) for s in sources] == ["in/b.png"]
    for text, refusal in zip(inputs[:4] + inputs[5:], refusals, strict=True):
        assert f"'{text}'" in refusal


def test_copies_never_replace_an_input(folder):
    with pytest.raises(ValueError, match="would replace it; give another output folder"):
        find_sources(["in/b.png"], "in")
    # Nor are they looked at when they lie in the folder that is named.
    Path("in/out").mkdir()
    Image.fromarray(street()).save("in/out/b.png")
    assert ("in/out/b.png", "in/out/b.png") not in copies(["in"], "in/out")
    assert len(copies(["in"], "in/out")) == 5


def test_frames_of_a_picture_and_a_video(folder):
    (picture,), (video,) = (find_sources([f"in/{n}"], "out")[0] for n in ("b.png", "walk.mp4"))
    (frame,) = picture.open()
    np.testing.assert_array_equal(frame, street())
    opened = video.open()
    assert (opened.num_frames, opened.fps) == (12, 10)
    frames = list(opened)
    assert len(frames) == 12
    for k, frame in enumerate(frames):  # RGB, in order; the codec is lossy
        assert frame.shape == (96, 128, 3)
        assert np.abs(frame.astype(int) - street(x=20 + k)).mean() < 6


def test_videos_that_cannot_be_read(folder, monkeypatch):
    whole = Path("in/walk.mp4").read_bytes()
    for name, content in (("text.mp4", b"no video" * 99), ("cut.mp4", whole[: len(whole) // 2])):
        Path(name).write_bytes(content)
        with pytest.raises(ValueError, match=f"'{name}' cannot be read; give one of .mp4"):
            Source(Path(name), Path("copy.mp4")).open()
    with pytest.raises(FileNotFoundError, match="'gone.mp4' does not exist"):
        Source(Path("gone.mp4"), Path("copy.mp4")).open()
    with pytest.raises(ValueError, match="The camera 'webcam:97' cannot be read"):
        Source(97, Path("copy.mp4")).open()
    monkeypatch.setattr("hkd_d2.inference.sources.MAX_PIXELS", 96 * 128 - 1)
    with pytest.raises(ValueError, match="frames of 128x96 pixels"):
        Source(Path("in/walk.mp4"), Path("copy.mp4")).open()


def test_a_video_that_ends_early_gives_what_it_has_and_says_so(folder):
    opened = Source(Path("in/walk.mp4"), Path("copy.mp4")).open()
    opened.num_frames = 40  # as a header that counts more than there is
    seen = []
    with pytest.raises(ValueError, match="'in/walk.mp4' ends after 12 of 40 frames"):
        for frame in opened:
            seen.append(frame)
    assert len(seen) == 12


def test_links_pipes_and_circles(folder):
    Path("elsewhere").mkdir()
    Image.fromarray(street()).save("elsewhere/d.png")
    Path("in/day2").symlink_to("../elsewhere")
    Path("elsewhere/back").symlink_to("../in")
    Path("in/broken.png").symlink_to("nowhere.png")
    os.mkfifo("in/pipe.jpg")
    sources, refusals = find_sources(["in"], "out")
    assert refusals == []
    names = [str(s) for s in sources]
    assert names == sorted([*(c for c, _ in copies(["in"]))]) and "in/day2/d.png" in names
    assert len(names) == 8
    for name in ("in/broken.png", "in/pipe.jpg"):
        (source,) = (s for s in sources if str(s) == name)
        with pytest.raises(FileNotFoundError, match=f"The image '{name}'"):
            source.open()
