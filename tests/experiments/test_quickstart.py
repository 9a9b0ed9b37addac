"""The quickstart: its statistics by hand, what it uses again, and the whole way in small."""

import argparse
import json
import subprocess

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from experiments import quickstart
from experiments import runs as training
from helpers.rules import rule
from hkd_d2.data.streets import PROVENANCE, generate_streets
from hkd_d2.visualization import Scene

pytestmark = rule(
    "Finished runs are used again, changed ones start over, and differences are paired by seed"
)


# ------------------------------------------------------------------------------------- statistics


def make_rows(teacher, plain, distilled):
    """Rows of the table, the same value in every miss rate; (miss rate, AP) pairs."""

    def row(kind, seed, values):
        miss, ap = values
        weight = {"parameters": 1.0, "gflops": 2.0, "ms": 3.0}
        return {
            "model": kind,
            "seed": seed,
            **weight,
            **dict.fromkeys(quickstart.MISS_RATES, miss),
            "AP": ap,
        }

    rows = [row(quickstart.TEACHER, 7, teacher)]
    for seed, (a, b) in enumerate(zip(plain, distilled, strict=True)):
        rows += [row(quickstart.PLAIN, seed, a), row(quickstart.DISTILLED, seed, b)]
    return rows


def test_summary_over_three_seeds_by_hand():
    rows = make_rows(
        (20.0, 50.0),
        [(40.0, 30.0), (46.0, 32.0), (43.0, 34.0)],
        [(37.0, 33.0), (40.0, 34.0), (41.0, 38.0)],
    )
    plain, distilled, difference, closed = quickstart.summarise(rows)
    # Deviations -3, 3, 0: variance 18 / 2 = 9, standard error 3 / sqrt(3).
    assert plain["Reasonable"] == pytest.approx(43.0)
    assert plain["Reasonable_se"] == pytest.approx(3 / 3**0.5)
    assert plain["ms"] == 3.0 and "ms_se" not in plain
    assert distilled["AP"] == pytest.approx(35.0)
    # Gains 3, 6, 2 about 11/3: squares 4/9 + 49/9 + 25/9 = 78/9, halved 13/3, root over sqrt(3).
    assert difference["Reasonable"] == pytest.approx(11 / 3)
    assert difference["Reasonable_se"] == pytest.approx((13 / 9) ** 0.5)
    assert difference["AP"] == pytest.approx(-3.0)
    assert difference["AP_se"] == pytest.approx(1 / 3**0.5)
    # 11/3 of 43 - 20 points, and 3 of 50 - 32.
    assert closed["All"] == pytest.approx(100 * 11 / 3 / 23)
    assert closed["AP"] == pytest.approx(100 * 3 / 18)
    assert "shown. Mean" in quickstart.judge(difference, 3)


def test_summary_of_one_seed_says_little():
    rows = make_rows((20.0, 50.0), [(40.0, 30.0)], [(37.0, 33.0)])
    difference, closed = quickstart.summarise(rows)
    assert difference["Heavy"] == pytest.approx(3.0) and difference["Heavy_se"] is None
    assert closed["Heavy"] == pytest.approx(15.0)
    assert "one seed says little" in quickstart.judge(difference, 1)


def test_gap_to_a_worse_teacher_is_no_gap():
    rows = make_rows((60.0, 10.0), [(40.0, 30.0)], [(37.0, 33.0)])
    _, closed = quickstart.summarise(rows)
    assert closed["Reasonable"] is None and closed["AP"] is None


def test_what_cannot_be_scored_is_a_dash():
    rows = make_rows((20.0, 50.0), [(40.0, 30.0)] * 2, [(37.0, 33.0)] * 2)
    for row in rows:
        row["Heavy"] = None
    summary = quickstart.summarise(rows)
    assert all(row["Heavy"] is None for row in summary)
    lines = quickstart.format_table([*rows, *summary]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    column = cells[0].index("MR^-2 Heavy")
    assert {line[column] for line in cells[2:]} == {"-"}
    assert cells[2] == ["teacher", "7", "1.00 M", "2.00", "3.0", "20.00", "-", "20.00", "50.00"]
    assert cells[-2][5] == "3.00 ± 0.00" and cells[-1][5] == "15 %"


@pytest.mark.parametrize(
    "gain, error, verdict",
    [(2.0, 1.9, ": shown."), (2.0, 2.0, ": not shown."), (-3.0, 1.0, ": not shown.")],
)
def test_claim_needs_more_than_the_standard_error(gain, error, verdict):
    assert verdict in quickstart.judge({"Reasonable": gain, "Reasonable_se": error}, 3)


def test_nothing_to_find_shows_nothing():
    assert "not shown, nothing to find" in quickstart.judge({"Reasonable": None}, 3)


# --------------------------------------------------------------------------------- small functions


def test_progress_is_read_from_the_log():
    line = (
        "[11/23 11:39:24 d2.utils.events]:  eta: 1 day, 0:09:10  iter: 319  total_loss: 0.802  "
        "loss_cls: 0.3374    time: 0.7264  last_time: 1.3433   lr: 0.00083554  \n"
    )
    text, eta = training.read_progress(line)
    assert text == "iteration 320: loss 0.802" and eta == 86400 + 9 * 60 + 10
    line = "[11/23 11:31:51 d2.evaluation.evaluator]: Inference done 100/200. ETA=0:00:05\n"
    assert training.read_progress(line) == ("evaluation: image 100 of 200", None)
    assert training.read_progress("anything else\n") is None


def test_seeds():
    assert quickstart.parse_seeds("0,2,1") == [0, 2, 1]
    for text in ("", "a", "0,0", "-1", "0 1"):
        with pytest.raises(argparse.ArgumentTypeError, match="no list of seeds"):
            quickstart.parse_seeds(text)


def test_models_take_turns(monkeypatch):
    calls, clock = [], iter(range(10**6))
    monkeypatch.setattr(quickstart, "PedestrianMapper", lambda cfg, train: lambda record: record)
    monkeypatch.setattr(quickstart.time, "perf_counter", lambda: next(clock))
    models = [lambda batch, n=name: calls.append((n, batch)) for name in "ab"]
    taken = quickstart.time_models(models, None, list(range(50)))
    assert taken == [1000.0, 1000.0]  # the clock ticks once a second, in milliseconds
    assert len(calls) == 2 * (quickstart.TIMED_IMAGES + quickstart.WARM_UP_IMAGES)
    assert calls[:4] == [("a", [0]), ("b", [0]), ("a", [1]), ("b", [1])]


def test_choice_of_images():
    """One pedestrian an image at most; who finds it is given as a letter: d, p, b(oth), or none."""
    box, none = np.array([[0.0, 0, 10, 20]]), np.zeros((0, 4))

    def scene(number, finder):
        found = {quickstart.DISTILLED: finder in "db", quickstart.PLAIN: finder in "pb"}
        return Scene(
            file_name=str(number),
            truth=none if finder == "-" else box,
            ignore=none,
            detections={name: box if finds else none for name, finds in found.items()},
        )

    scenes = [scene(number, finder) for number, finder in enumerate("-bdbdpdpb")]
    chosen = quickstart.choose_scenes(scenes)
    # Eight are populated, from the second on; by their place the third and the sixth of these.
    assert {label: s.file_name for label, s in chosen.items()} == {
        "image 3\ndistilled finds 1 more": "2",
        "image 5\ndistilled finds 1 more": "4",
        "image 6\nplain finds 1 more": "5",
        "image 4\nby its place": "3",
        "image 7\nby its place": "6",
    }


# ------------------------------------------------------------------------------------ using again


@pytest.fixture
def finished(tmp_path):
    """Runs of one seed that look as if they had been trained."""
    (tmp_path / "streets").mkdir()
    (tmp_path / "streets" / PROVENANCE).write_text('{"seed": 0}')
    runs = quickstart.plan_runs(tmp_path, [0], smoke=True)
    for run in runs:
        run.folder.mkdir()
        run.weights.write_bytes(b"weights")
        run.record.write_text(json.dumps({"settings": run.settings(), "seconds": 10.0}))
    return runs


def test_finished_runs_are_used_again(finished, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)  # training would fail
    for run in finished:
        assert run.changed() == []
        quickstart.train(run, [])
    assert capsys.readouterr().out.count("already there, took 0:00:10") == 3
    assert quickstart.predict(finished, 1.0) == 0


def test_changes_are_named(finished, tmp_path):
    teacher, plain, distilled = finished
    teacher.weights.write_bytes(b"other weights")
    assert [run.changed() for run in finished] == [[], [], ["the teacher's weights"]]
    plain.changes = [*plain.changes, "SOLVER.MAX_ITER", 3]
    assert plain.changed() == ["SOLVER.MAX_ITER"]
    (tmp_path / "streets" / PROVENANCE).write_text('{"seed": 1}')
    assert teacher.changed() == ["the streets"]
    teacher.weights.unlink()  # while it is trained anew
    assert teacher.changed() is None
    assert distilled.changed() == ["the streets", "the teacher's weights"]


def test_another_place_changes_nothing(finished, tmp_path):
    for run in finished:
        assert str(tmp_path) not in json.dumps(run.settings())


def test_interrupted_run_starts_over(finished, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", interrupt)
    plain = finished[1]
    plain.record.write_text(json.dumps({"settings": {}, "seconds": None}))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quickstart.train(plain, [])
        assert "starting over, since it was interrupted" in capsys.readouterr().out
        assert plain.changed() is None and not plain.weights.exists()


def test_folders_of_others_are_left_alone(tmp_path):
    teacher, *_ = quickstart.plan_runs(tmp_path, [0], smoke=True)
    teacher.folder.mkdir()
    (teacher.folder / "model_final.pth").write_bytes(b"mine")
    with pytest.raises(ValueError, match="something else than a run of the quickstart"):
        quickstart.train(teacher, [])
    assert teacher.weights.read_bytes() == b"mine"


def test_remaining_time_scales_with_what_was_measured(tmp_path):
    runs = quickstart.plan_runs(tmp_path, [0], smoke=True)
    assert quickstart.measured_speed(runs) == 1.0
    nominal = [2 * quickstart.SECONDS_PER_ITERATION[run.kind] for run in runs]  # two iterations
    assert quickstart.predict(runs, 1.0) == pytest.approx(sum(nominal))
    runs[0].folder.mkdir()
    seconds = 3 * nominal[0]
    runs[0].record.write_text(json.dumps({"settings": {}, "seconds": seconds}))
    assert quickstart.measured_speed(runs) == pytest.approx(3.0)
    assert quickstart.predict(runs[1:], 3.0) == pytest.approx(3 * sum(nominal[1:]))


# -------------------------------------------------------------------------------------- whole way


@pytest.fixture
def streets_unregistered():
    """The names are free before, and free again after."""
    names = ("streets_train", "streets_val")
    for when in ("before", "after"):
        for name in names:
            if name in DatasetCatalog:
                DatasetCatalog.pop(name)
                MetadataCatalog.pop(name)
        if when == "before":
            yield


def test_whole_way_twice(streets_unregistered, tmp_path, monkeypatch, capsys):
    output = tmp_path / "quickstart"
    quickstart.main(["--smoke", "--seeds", "0", "--output", str(output)])
    printed = capsys.readouterr().out
    for phase in ("[1/5] streets", "[2/5] teacher, seed 7", "[3/5] plain student, seed 0"):
        assert phase in printed
    assert "[4/5] distilled student, seed 0" in printed and "[5/5] comparison" in printed
    assert "README" in printed.splitlines()[-1]

    content = json.loads((output / "results.json").read_text())
    assert [(row["model"], row.get("seed")) for row in content["rows"]] == [
        ("teacher", 7),
        ("plain student", 0),
        ("distilled student", 0),
        ("plain - distilled", 0),
        ("gap to the teacher closed", 0),
        ("ratio teacher : student", None),
        ("headline teacher", None),
        ("headline student", None),
        ("ratio headline pair", None),
    ]
    teacher, plain, distilled, *_, headline = content["rows"]
    assert plain["parameters"] == distilled["parameters"] < teacher["parameters"] / 6
    assert plain["gflops"] == distilled["gflops"] < teacher["gflops"]
    assert headline["parameters"] > 6  # the promise of the configs
    assert content["num_images"] == 4 and content["missing_point"] == "official"
    assert "one seed says little" in content["claim"]

    # The table has the scores of the run's own evaluation.
    folders = ("teacher", "student_seed0", "hkd_seed0")
    for row, folder in zip(content["rows"], folders, strict=False):
        lines = (output / folder / "metrics.json").read_text().splitlines()
        last = next(m for m in map(json.loads, reversed(lines)) if "bbox/AP" in m)
        for column, setup in quickstart.MISS_RATES.items():
            assert row[column] == pytest.approx(last[f"miss_rate/{setup}"], abs=1e-9)
        assert row["AP"] == pytest.approx(last["bbox/AP"], abs=1e-9)
        assert "eta" in (output / folder / "log.txt").read_text()

    report = (output / "results.md").read_text()
    assert report.count("\n| ") == 2 + len(content["rows"]) and content["claim"] in report
    for name in ("miss_rate_curves.png", "training_curves.png", "detections.png"):
        assert f"({name})" in report
        assert min(Image.open(output / name).size) > 400

    # A second call trains nothing.
    monkeypatch.setattr(subprocess, "Popen", None)
    quickstart.main(["--smoke", "--seeds", "0", "--output", str(output)])
    printed = capsys.readouterr().out
    assert printed.count("already there") == 3
    assert json.loads((output / "results.json").read_text())["claim"] == content["claim"]


def test_failed_training_is_told_and_not_used(tmp_path):
    generate_streets(tmp_path / "streets", num_train=1, num_val=1, workers=1)
    teacher, *_ = quickstart.plan_runs(tmp_path, [0], smoke=True)
    teacher.changes = [*teacher.changes, "HKD.SOLVER.OPTIMIZER", "adam"]
    with pytest.raises(RuntimeError, match="(?s)teacher, seed 7 ended with status 2.*choose sgd"):
        quickstart.train(teacher, [])
    assert teacher.changed() is None
