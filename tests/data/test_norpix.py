import pytest

from helpers.rules import rule
from helpers.small_datasets import jpeg, write_seq
from hkd_d2.data.datasets.norpix import NorpixSequence

pytestmark = rule("Frames come out of .seq videos byte by byte")

FRAMES = [jpeg(grey, (48, 64)) for grey in (0, 80, 160, 240)]


@pytest.mark.parametrize("form", [102, 201])
@pytest.mark.parametrize("gap", [8, 16])
def test_frames_byte_by_byte(tmp_path, gap, form):
    write_seq(tmp_path / "V000.seq", FRAMES, gap, form, size=(48, 64))
    with NorpixSequence(str(tmp_path / "V000.seq")) as sequence:
        assert (sequence.width, sequence.height, sequence.length) == (64, 48, 4)
        assert sequence.fps == 30
        assert [sequence.frame(i) for i in (2, 0, 3, 1, 1)] == [FRAMES[i] for i in (2, 0, 3, 1, 1)]
        with pytest.raises(IndexError, match="counted from 0, not -1"):
            sequence.frame(-1)


def test_one_frame(tmp_path):
    write_seq(tmp_path / "V000.seq", FRAMES[:1])
    with NorpixSequence(str(tmp_path / "V000.seq")) as sequence:
        assert sequence.frame(0) == FRAMES[0]
        with pytest.raises(ValueError, match="V000.seq: frame 1 is not there or cut short"):
            sequence.frame(1)


@pytest.mark.parametrize("lost", [1, 20, len(FRAMES[3]), len(FRAMES[3]) + 4])
def test_truncated(tmp_path, lost):
    path = tmp_path / "V000.seq"
    write_seq(path, FRAMES, gap=8)
    path.write_bytes(path.read_bytes()[: -8 - lost])
    with NorpixSequence(str(path)) as sequence:
        assert sequence.frame(2) == FRAMES[2]
        with pytest.raises(ValueError, match="frame 3 is not there or cut short of the 4 that its"):
            sequence.frame(3)


def test_what_is_no_sequence(tmp_path):
    path = tmp_path / "V000.seq"
    with pytest.raises(FileNotFoundError, match="V000.seq: no such video"):
        NorpixSequence(str(path))
    for content in (b"", b"\xed\xfe\0\0", bytes(2000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"V000.seq: no Norpix sequence \(.seq\)"):
            NorpixSequence(str(path))
    write_seq(path, FRAMES, form=100)
    with pytest.raises(ValueError, match=r"image format 102 or 201 \(JPEG\) .*not 1024 and 100"):
        NorpixSequence(str(path))
    write_seq(path, [FRAMES[0], b"no picture"])
    with (
        NorpixSequence(str(path)) as sequence,
        pytest.raises(ValueError, match="frame 1 is no whole JPEG"),
    ):
        sequence.frame(1)
