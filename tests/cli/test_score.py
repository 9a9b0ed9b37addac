"""hkd score."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from helpers.rules import rule
from hkd_d2.evaluation.miss_rate import SETUPS

ROOT = Path(__file__).resolve().parents[2]

# 10 images, four people of height 60, one of them 30 % visible. Detections by score: found, false
# positive, found. Reasonable (3 people): misses 2/3 under FPPI 0.1, 1/3 from 0.1 on.
BOX = [100, 100, 25, 60]
GROUND_TRUTH = {
    "images": [{"id": image} for image in range(10)],
    "categories": [{"id": 1, "name": "pedestrian"}],
    "annotations": [
        {
            "id": image,
            "image_id": image,
            "category_id": 1,
            "bbox": BOX,
            "height": 60,
            "vis_ratio": 0.3 if image == 3 else 1.0,
            "ignore": 0,
        }
        for image in range(4)
    ],
}
DETECTIONS = [
    {"image_id": image, "category_id": 1, "bbox": BOX, "score": score}
    for image, score in ((0, 0.9), (9, 0.8), (1, 0.7))
]
REASONABLE = 100 * ((2 / 3) ** 4 * (1 / 3) ** 5) ** (1 / 9)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "gt.json").write_text(json.dumps(GROUND_TRUTH))
    (tmp_path / "found.json").write_text(json.dumps(DETECTIONS))
    (tmp_path / "broken.json").write_text("[")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "hkd_d2", "score", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    return run


def test_json_alone_on_stdout(run):
    done = run("gt.json", "found.json", "--json")
    assert done.returncode == 0, done.stderr
    percent = json.loads(done.stdout)
    assert list(percent) == list(SETUPS)
    assert percent["Reasonable"] == pytest.approx(REASONABLE, rel=1e-14)
    assert percent["Reasonable_occ=heavy"] == 100
    assert percent["large"] == -100
    assert "10 images" in done.stderr  # the rule for missing points matters on so few


def test_table(run):
    done = run("gt.json", "found.json", "--setups", "Reasonable", "heavy")
    assert done.returncode == 0, done.stderr
    first, second, *table = done.stdout.splitlines()
    assert first == "found.json: 3 detections, 10 images"
    assert second == "missing reference points: official"
    assert [line.split() for line in table[1:4]] == [
        ["setup", "height", "visibility", "boxes", "MR^-2", "%"],
        ["Reasonable", ">=", "50", ">=", "0.65", "3", f"{REASONABLE:.2f}"],
        ["heavy", ">=", "50", "0", "to", "0.65", "1", "100.00"],
    ]


def test_missing_point_rule(run, tmp_path):
    # a false positive first: the four reference values under 0.1 have no operating point
    scores = (0.7, 0.8, 0.6)
    rows = [row | {"score": score} for row, score in zip(DETECTIONS, scores, strict=True)]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    arguments = ("gt.json", "found.json", "--json", "--setups", "Reasonable")
    rate = json.loads(run(*arguments).stdout)["Reasonable"]
    assert rate == pytest.approx(100 / 3, rel=1e-14)
    rate = json.loads(run(*arguments, "--missing-point", "matlab").stdout)["Reasonable"]
    assert rate == pytest.approx(100 * (1 / 3) ** (5 / 9), rel=1e-14)


def test_a_protocol_by_name_and_its_rules(run):
    done = run("gt.json", "found.json", "--protocol", "caltech", "--setups", "All")
    assert done.returncode == 0, done.stderr
    first, second, _, _, row, _, *rules = done.stdout.splitlines()
    assert (first, second) == (
        "found.json: 3 detections, 10 images",
        "missing reference points: matlab",
    )
    # All four people: misses 3/4 under FPPI 0.1, 1/2 from there on: (0.75^4 0.5^5)^(1/9).
    assert row.split() == ["All", ">=", "20", ">=", "0.2", "4", "59.87"]
    assert rules[0] == "protocol: caltech (dbEval.m 3.2.1, pdollar/toolbox)"
    assert "bounds that do not belong to the ranges: the upper bound of height" in rules
    assert "ground truth outside x 4 to 634, y 4 to 474: ignored" in rules


def test_crowdhuman_by_its_own_files(run, tmp_path):
    sized = [
        image | {"width": 640, "height": 480, "file_name": f"{image['id']}.jpg"}
        for image in GROUND_TRUTH["images"]
    ]
    (tmp_path / "gt.json").write_text(json.dumps(GROUND_TRUTH | {"images": sized}))
    line = {"ID": "0", "dtboxes": [{"box": BOX, "score": 0.9}]}
    (tmp_path / "found.odgt").write_text(json.dumps(line))
    done = run("gt.json", "found.odgt", "--protocol", "crowdhuman", "--json")
    assert done.returncode == 0, done.stderr
    percent = json.loads(done.stdout)
    assert list(percent) == ["AP", "MR^-2", "JI"]
    assert percent["MR^-2"] == pytest.approx(75) and percent["JI"] == pytest.approx(25, abs=1e-3)
    done = run("gt.json", "found.odgt", "--protocol", "crowdhuman", "--setups", "All")
    assert done.returncode == 2 and "crowdhuman has no setups" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gt.json", "nowhere.json"), "nowhere.json does not exist"),
        (("gt.json", "broken.json"), "broken.json is not valid JSON"),
        (("found.json", "gt.json"), "found.json holds a list"),
        (("gt.json", "found.json", "--setups", "Most"), "setup 'Most' is unknown"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run, arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("hkd score: ") and done.stderr.count("\n") == 1


@rule("The miss rate needs NumPy alone")
def test_needs_numpy_alone(run, tmp_path):
    """In an interpreter that finds nothing but its own library, NumPy and this package."""
    only = tmp_path / "only"
    only.mkdir()
    numpy_folder = Path(numpy.__file__).parent
    for folder in (numpy_folder, numpy_folder.with_name("numpy.libs"), ROOT / "hkd_d2"):
        if folder.is_dir():
            (only / folder.name).symlink_to(folder)

    def run_alone(*arguments):
        code = (
            f"import runpy, sys; sys.path.append({str(only)!r}); "
            f"sys.argv = ['evaluate_miss_rate.py', 'gt.json', 'found.json', *{arguments!r}]; "
            f"runpy.run_path({str(ROOT / 'tools/evaluate_miss_rate.py')!r}, run_name='__main__')"
        )
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
        )

    done = run_alone("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(run("gt.json", "found.json", "--json").stdout)
    images = [{"id": image, "width": 640, "height": 480} for image in range(10)]
    (tmp_path / "gt.json").write_text(json.dumps(GROUND_TRUTH | {"images": images}))
    done = run_alone("--protocol", "crowdhuman")
    assert done.returncode == 2
    assert "CrowdHuman's scores need SciPy" in done.stderr


def test_a_score_in_which_nothing_counts_is_refused(run, tmp_path):
    (tmp_path / "gt.json").write_text(json.dumps(GROUND_TRUTH | {"annotations": []}))
    done = run("gt.json", "found.json", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the ground truth has no box of category 1" in done.stderr
    assert "no setup counts a pedestrian" in done.stderr


def test_kaists_files_as_they_are_published(run, tmp_path):
    names = ["set06/V000/I00019", "set09/V000/I00019"]
    truth = {
        "images": [{"id": number, "im_name": name} for number, name in enumerate(names)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": BOX, "height": 60, "occlusion": 0}
            for n in (0, 1)
        ],
    }
    (tmp_path / "gt.json").write_text(json.dumps(truth), encoding="utf-8-sig")
    box = ",".join(map(str, BOX))
    (tmp_path / "found.txt").write_text(f"1,{box},0.9\n2,{box},0.8\n")
    scores = {}
    for part in ("day", "night"):
        done = run("gt.json", "found.txt", "--protocol", "kaist", "--part", part, "--json")
        assert done.returncode == 0, done.stderr
        scores[part] = json.loads(done.stdout)["Reasonable"]
    # By day the one match is with the annotation of id 0, as the published script has it.
    assert scores == {"day": 100, "night": 0}


def test_heights_of_resized_images(run):
    done = run("gt.json", "found.json", "--height-scale", "2", "--setups", "Reasonable", "All")
    assert done.returncode == 0, done.stderr
    assert ">= 100" in done.stdout and "height scale: 2" in done.stdout
    done = run("gt.json", "found.json", "--height-scale", "0")
    assert (done.returncode, done.stdout) == (2, "")
