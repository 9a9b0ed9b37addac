"""Detection files: there and back, and every kind of bad row."""

import json
import math

import pytest

from helpers.rules import rule
from hkd_d2.evaluation import load_ground_truth
from hkd_d2.evaluation.result_files import (
    read_caltech,
    read_citypersons_submission,
    read_coco,
    read_crowdhuman,
    read_results,
    write_caltech,
    write_citypersons_submission,
    write_coco,
    write_crowdhuman,
)

pytestmark = rule("Result files survive a round trip, and a bad row is named")


def truth(*names):
    """Ground truth without annotations; ids are not in the order of names on purpose."""
    return {
        "images": [
            {"id": 30 - n, "file_name": f"some/{name}.jpg", "width": 640, "height": 480}
            for n, name in enumerate(names)
        ],
        "categories": [{"id": 1}],
        "annotations": [],
    }


CALTECH = truth("set06_V000_I00029", "set06_V000_I00059", "set07_V011_I00029")
CROWD = truth("273271,c9db000d5146c15", "a.b,1", "empty")
BERLIN = "berlin_000000_000019_leftImg8bit", "berlin_000001_000019_leftImg8bit"
CITY = truth(*BERLIN, "munich_000397_000019_leftImg8bit")
LIST = """\
/data/berlin/images/berlin00001_000019_img.png
/data/berlin/images/berlin00000_000019_img.png
/data/munich/images/munich00397_000019_img.png
"""


def found(image, score=0.1, box=(1.5, 2.25, 1 / 3, 4e-7), category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


ROWS = [found(30, 0.9), found(30, 1 / 3), found(29, -2.5), found(30, 0.95), found(28)]


def by_image(rows):
    return sorted(rows, key=lambda row: row["image_id"])  # stable: the order in an image stays


@pytest.mark.parametrize("rows", [ROWS, []])
def test_there_and_back(tmp_path, rows):
    write_coco(tmp_path / "found.json", rows, CITY)
    assert read_coco(tmp_path / "found.json", CITY) == rows
    write_caltech(tmp_path / "caltech", rows, CALTECH)
    assert by_image(read_caltech(tmp_path / "caltech", CALTECH)) == by_image(rows)
    write_crowdhuman(tmp_path / "found.odgt", rows, CROWD)
    assert by_image(read_crowdhuman(tmp_path / "found.odgt", CROWD)) == by_image(rows)
    (tmp_path / "test_imgids.txt").write_text(LIST)
    submission = tmp_path / "submission.json", tmp_path / "test_imgids.txt"
    write_citypersons_submission(submission[0], rows, submission[1], CITY)
    assert by_image(read_citypersons_submission(*submission, CITY)) == by_image(rows)


def test_the_name_tells_the_form(tmp_path):
    write_coco(tmp_path / "found.json", ROWS, CALTECH)
    write_caltech(tmp_path / "caltech", ROWS, CALTECH)
    write_crowdhuman(tmp_path / "found.odgt", ROWS, CALTECH)
    for name in ("found.json", "caltech", "found.odgt"):
        assert by_image(read_results(tmp_path / name, CALTECH)) == by_image(ROWS)


def test_submissions_have_the_lines_of_the_list(tmp_path):
    (tmp_path / "test_imgids.txt").write_text(LIST)
    path = tmp_path / "submission.json"
    write_citypersons_submission(path, ROWS, tmp_path / "test_imgids.txt", CITY)
    rows = json.loads(path.read_text())
    # Image 30 is berlin 0, the second line; 29 berlin 1, the first; 28 munich, the third.
    assert [(row["image_id"], row["score"]) for row in rows] == [
        (1, -2.5), (2, 0.9), (2, 1 / 3), (2, 0.95), (3, 0.1)
    ]  # fmt: skip


def test_caltech_counts_frames_and_pixels_from_one(tmp_path):
    write_caltech(tmp_path, [found(29, 0.5, (1, 2, 3, 4)), found(30, 0.25, (5, 6, 7, 8))], CALTECH)
    lines = (tmp_path / "set06" / "V000.txt").read_text().splitlines()
    assert lines == ["30,6.0,7.0,7.0,8.0,0.25", "60,2.0,3.0,3.0,4.0,0.5"]
    assert (tmp_path / "set07" / "V011.txt").read_text() == ""
    (tmp_path / "set07" / "V011.txt").write_text("30.000000 1 2 3 4 0.5\n\n")  # as np.savetxt
    assert read_caltech(tmp_path, CALTECH)[2] == found(28, 0.5, (0, 1, 3, 4))


def test_crowdhuman_has_a_line_for_each_image(tmp_path):
    write_crowdhuman(tmp_path / "found.odgt", [found(29, 0.5, (1, 2, 3, 4))], CROWD)
    lines = [json.loads(line) for line in (tmp_path / "found.odgt").read_text().splitlines()]
    box = {"box": [1, 2, 3, 4], "score": 0.5, "tag": 1}
    assert [(line["ID"], line["dtboxes"]) for line in lines] == [
        ("273271,c9db000d5146c15", []), ("a.b,1", [box]), ("empty", [])
    ]  # fmt: skip
    assert lines[0]["width"] == 640


BAD = [
    (found(30, math.nan), "score nan"),
    (found(30, box=(1, 2, math.inf, 4)), "finite"),
    (found(30, box=(1, 2, -3, 4)), "negative width or height"),
    (found(30, box=(1, 2, 3)), "four numbers"),
    (found(30, box=(1, 2, 10**400, 4)), "finite"),  # an integer that no float can hold
    (found(31), "lies in image 31"),
    (found(30, category="1"), "category_id '1'"),
    (found(30, category=2), "category_id 2"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_are_neither_written_nor_read(tmp_path, row, message):
    rows = [found(30), row]
    for write, ground_truth in (
        (write_coco, CITY),
        (write_caltech, CALTECH),
        (write_crowdhuman, CROWD),
    ):
        with pytest.raises(ValueError, match=f"out.*detection 1 .*{message}"):
            write(tmp_path / "out", rows, ground_truth)
        assert not (tmp_path / "out").exists()
    (tmp_path / "found.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=f"found.json: detection 1 .*{message}"):
        read_coco(tmp_path / "found.json", CITY)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("30,1,2,3,4", "give frame, x, y, w, h, score"),
        ("30,1,2,3,4,x", "give frame, x, y, w, h, score"),
        ("30,1,2,3,4,0.5,6", "give frame, x, y, w, h, score"),
        ("30,nan,2,3,4,0.5", "finite"),
        ("30,1,2,3,4,nan", "score nan"),
        ("30,1,2,3,-4,0.5", "negative"),
        ("29,1,2,3,4,0.5", "frame 29 "),
        ("30.5,1,2,3,4,0.5", "frame 30.5 "),
    ],
)
def test_bad_lines_of_caltech(tmp_path, line, message):
    write_caltech(tmp_path, [], CALTECH)
    (tmp_path / "set06" / "V000.txt").write_text(f"30 1 2 3 4 0.5\n{line}\n")
    with pytest.raises(ValueError, match=f"V000.txt: line 2 .*{message}"):
        read_caltech(tmp_path, CALTECH)


NO_TEXT = b"{\xff}"


def test_files_that_are_no_text_or_no_file(tmp_path):
    write_caltech(tmp_path, [], CALTECH)
    (tmp_path / "set06" / "V000.txt").write_bytes(NO_TEXT)
    with pytest.raises(ValueError, match="V000.txt is no text file"):
        read_results(tmp_path, CALTECH)
    path = tmp_path / "found.odgt"
    for content, message in ((NO_TEXT, "is no text file"), (b"\n", "is empty; write a line for")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"found.odgt {message}"):
            read_results(path, CROWD)
    (tmp_path / "list.txt").write_bytes(NO_TEXT)
    with pytest.raises(ValueError, match="list.txt is no text file"):
        read_citypersons_submission(tmp_path / "found.json", tmp_path / "list.txt", CITY)
    path = tmp_path / "found.json"
    for content in (b"{", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="found.json is not valid JSON"):
            read_results(path, CITY)
    with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
        load_ground_truth(tmp_path)


BOX = {"box": [1, 2, 3, 4], "score": 0.5, "tag": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ("[]", "line 2 has no text 'ID'"),
        ({"ID": "empty"}, "list 'dtboxes'"),
        ({"ID": "other", "dtboxes": []}, "line 2 is of image 'other'"),
        ({"ID": "a.b,1", "dtboxes": []}, "'a.b,1' stands twice"),
        ({"ID": "empty", "dtboxes": [BOX, 7]}, r"dtboxes\[1\] is 7"),
        ({"ID": "empty", "dtboxes": [{"box": [1, 2, 3, 4]}]}, r"dtboxes\[0\].*box and score"),
        ({"ID": "empty", "dtboxes": [BOX | {"box": [1, 2, 3, math.nan]}]}, r"\[0\].*finite"),
        ({"ID": "empty", "dtboxes": [BOX | {"box": [1, 2, -3, 4]}]}, r"\[0\].*negative"),
        ({"ID": "empty", "dtboxes": [BOX | {"score": math.inf}]}, r"\[0\] has score inf"),
        ({"ID": "empty", "dtboxes": [BOX | {"score": 10**400}]}, r"\[0\] has score 10000"),
        ({"ID": "empty", "dtboxes": [BOX | {"tag": 0}]}, r"\[0\] has tag 0"),
    ],
)
def test_bad_lines_of_crowdhuman(tmp_path, line, message):
    path = tmp_path / "found.odgt"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text('{"ID": "a.b,1", "dtboxes": []}\n' + text + "\n")
    with pytest.raises(ValueError, match="found.odgt: line 2.*" + message.replace("line 2", "")):
        read_crowdhuman(path, CROWD)


def test_lists_that_do_not_fit(tmp_path):
    path = tmp_path / "test_imgids.txt"
    for text, message in (
        (LIST + "/data/bonn/images/bonn00000_000019_img.png\n", "line 4 names"),
        ("".join(LIST.splitlines(True)[:2]), "lists 2 images, the ground truth 3"),
        (LIST + LIST.splitlines(True)[0], "lists 4 images"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            write_citypersons_submission(tmp_path / "s.json", [], path, CITY)
    path.write_text(LIST)
    (tmp_path / "s.json").write_text(json.dumps([found(4)]))
    with pytest.raises(ValueError, match="s.json: detection 0 lies in image 4"):
        read_citypersons_submission(tmp_path / "s.json", path, CITY)


def test_missing_files_and_names(tmp_path):
    for read in (read_coco, read_crowdhuman):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere", CITY)
    with pytest.raises(FileNotFoundError, match="V000.txt does not exist"):
        read_caltech(tmp_path, CALTECH)
    with pytest.raises(FileNotFoundError, match="imgids.txt"):
        write_citypersons_submission(tmp_path / "s.json", [], tmp_path / "imgids.txt", CITY)
    with pytest.raises(ValueError, match="give names as set06_V000_I00029"):
        write_caltech(tmp_path, [], CITY)
    with pytest.raises(ValueError, match="Image 3 has no file_name"):
        write_caltech(tmp_path, [], {"images": [{"id": 3}]})
    sizeless = {"images": [{"id": 3, "file_name": "a.jpg"}]}
    with pytest.raises(ValueError, match=r"images\[0\] of the ground truth lacks width"):
        write_crowdhuman(tmp_path / "x.odgt", [], sizeless)


KAIST = {
    "images": [{"id": 0, "im_name": "set06/V000/I00019"}, {"id": 1, "im_name": "set09/V000/I00019"}]
}


def test_kaists_text_counts_images_from_one(tmp_path):
    path = tmp_path / "MLPD_result.txt"
    path.write_text("1,10,20,30,60,0.5\n\n2, 1.5,2,3,4, 0.25\n")
    assert read_results(path, KAIST) == [
        found(0, 0.5, (10.0, 20.0, 30.0, 60.0)),
        found(1, 0.25, (1.5, 2.0, 3.0, 4.0)),
    ]
    for line, message in (
        ("0,1,2,3,4,0.5", "of image 0 .from 1., and the ground truth has 2"),
        ("3,1,2,3,4,0.5", "of image 3"),
        ("1.5,1,2,3,4,0.5", "of image 1.5"),
        ("1,1,2,3,4", "give image, x, y, w, h, score"),
        ("1,1,2,-3,4,1", "negative width"),
        ("1,1,2,3,4,nan", "score nan"),
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match="result.txt: line 1 .*" + message):
            read_results(path, KAIST)
