"""Ground truth in the benchmarks' own forms."""

import numpy as np
import pytest
import scipy.io

from helpers.small_datasets import write_vbb
from hkd_d2.evaluation import PROTOCOLS, evaluate_miss_rate
from hkd_d2.evaluation.ground_truth_files import open_ground_truth, select_part
from hkd_d2.evaluation.result_files import read_results

NEW = PROTOCOLS["caltech_new"]


def save(path, variable, *frames):
    cells = np.empty((1, len(frames)), dtype=object)
    for place, rows in enumerate(frames):
        cells[0, place] = np.array(rows, dtype=float).reshape(-1, 5) if rows else np.zeros((0, 0))
    scipy.io.savemat(path, {variable: cells})
    return path


@pytest.mark.parametrize("setup", ["Reasonable", "All", "Occ=heavy", "Scale=far"])
@pytest.mark.parametrize("name", ["caltech", "caltech_new"])
def test_what_dbeval_keeps_of_a_setup(tmp_path, setup, name):
    # Frame 1: a person at the very edge, whose flag says that it counts, found; and one ignored.
    # Frame 2: a person who is missed. Frame 3: a false positive.
    height = 25 if setup == "Scale=far" else 60
    person, other = [1, 1, 0.41 * height, height], [300, 300, 0.41 * height, height]
    truth = save(
        tmp_path / f"gt-{setup}.mat", "gt", [[*person, 0], [*other, 1]], [[*person, 0]], []
    )
    found = save(
        tmp_path / "dt-mine.mat", "dt", [[*person, 0.9], [*other, 0.8]], [], [[*person, 0.7]]
    )
    ground_truth, rules, setups = open_ground_truth(truth, PROTOCOLS[name])
    assert list(setups) == [setup] and rules.border is None
    assert ground_truth["annotations"][0]["bbox"] == [0, 0, *person[2:]]
    detections = read_results(found, ground_truth, rules)
    assert [row["image_id"] for row in detections] == [1, 1, 3]
    result = evaluate_miss_rate(ground_truth, detections, setups, protocol=rules)[setup]
    assert (result.num_ground_truth, result.num_detections) == (2, 2)
    assert result.miss.tolist() == [0.5, 0.5]
    assert result.fppi.tolist() == [0, 1 / 3]


def test_mat_files_that_do_not_fit(tmp_path):
    truth = save(tmp_path / "gt-Reasonable.mat", "gt", [], [])
    with pytest.raises(ValueError, match="holds the boxes of setup Reasonable alone"):
        open_ground_truth(truth, NEW, ["All"])
    with pytest.raises(ValueError, match="is Caltech's ground truth, and protocol 'kaist'"):
        open_ground_truth(truth, PROTOCOLS["kaist"])
    with pytest.raises(ValueError, match="name it gt-SETUP.mat"):
        open_ground_truth(save(tmp_path / "truth.mat", "gt", []), NEW)
    with pytest.raises(FileNotFoundError, match="gt-All.mat does not exist"):
        open_ground_truth(tmp_path / "gt-All.mat", NEW)
    (tmp_path / "gt-All.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match="gt-All.mat has no cells 'gt'"):
        open_ground_truth(tmp_path / "gt-All.mat", NEW)
    ground_truth, rules, _ = open_ground_truth(truth, NEW)
    with pytest.raises(ValueError, match="has 1 frames, the ground truth 2"):
        read_results(save(tmp_path / "dt-a.mat", "dt", []), ground_truth, rules)
    with pytest.raises(ValueError, match="is a folder, which is Caltech's form"):
        open_ground_truth(tmp_path, PROTOCOLS["kaist"])


def test_day_and_night_of_one_file():
    names = ["set06/V000/I00019", "set08_V001_I00039", "set09/V000/I00019"]
    ground_truth = {
        "images": [{"id": number, "im_name": name} for number, name in enumerate(names)],
        "categories": [],
        "annotations": [{"image_id": number} for number in (0, 1, 2, 2)],
    }
    detections = [{"image_id": 2}, {"image_id": 1}]
    day, found_by_day = select_part(ground_truth, detections, "day")
    night, found_by_night = select_part(ground_truth, detections, "night")
    assert [image["id"] for image in day["images"]] == [0, 1]
    assert [image["id"] for image in night["images"]] == [2]
    assert (len(day["annotations"]), len(night["annotations"])) == (2, 2)
    assert (found_by_day, found_by_night) == ([{"image_id": 1}], [{"image_id": 2}])
    with pytest.raises(ValueError, match="choose one of day, night"):
        select_part(ground_truth, detections, "dusk")
    with pytest.raises(ValueError, match="is named 'a.png'; day and night are told by"):
        select_part({"images": [{"id": 1, "file_name": "a.png"}]}, [], "day")


def test_caltechs_folder_with_its_vbb_files(tmp_path):
    for number in range(6, 11):
        path = tmp_path / "annotations" / f"set{number:02d}" / "V000.vbb"
        write_vbb(path, 60, ["person"], {30: [(1, (101, 101, 24.6, 60), (0, 0, 0, 0))]})
    ground_truth, rules, setups = open_ground_truth(tmp_path, PROTOCOLS["caltech"], ["Reasonable"])
    assert len(ground_truth["images"]) == 10  # frames 29 and 59 of each video
    assert {row["bbox"][0] for row in ground_truth["annotations"]} == {100}  # pixels from 0
    for number in range(6, 11):
        folder = tmp_path / "found" / f"set{number:02d}"
        folder.mkdir(parents=True)
        (folder / "V000.txt").write_text("30,101,101,24.6,60,0.9\n")
    detections = read_results(tmp_path / "found", ground_truth, rules)
    result = evaluate_miss_rate(ground_truth, detections, setups, protocol=rules)["Reasonable"]
    assert (result.num_ground_truth, result.miss_rate) == (5, 0)
