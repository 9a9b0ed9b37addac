"""The comparison of pre-training methods: its pictures, runs used again, gains by hand."""

import json

import pytest

from experiments import compare_pretraining, pretraining


def record(method, seed, student, **more):
    settings = {"METHOD": method, "seed": seed}
    return {"settings": settings, "student": student, "seconds": 10.0 + seed, **more}


def test_gains_are_paired_by_seed():
    records = [
        record("hsakd", 0, 0.9, teacher=0.95),
        record("labels", 1, 0.8),
        record("labels", 0, 0.7),
        record("hsakd", 1, 0.84, teacher=0.97),
        record("kd", 1, 0.85, teacher=0.97),
    ]
    labels, kd, hsakd = pretraining.summarise(records)
    assert [x["method"] for x in (labels, kd, hsakd)] == ["labels", "kd", "hsakd"]
    assert labels["student"] == pytest.approx((75.0, 5.0)) and labels["other"] is None
    assert labels["labels"] is None
    assert labels["kd"] == (pytest.approx(-5.0), None)  # kd has no seed 0
    assert kd["labels"] == (pytest.approx(5.0), None)
    # 20 and 4: their standard deviation is 16 / sqrt 2, over sqrt 2.
    assert hsakd["labels"] == pytest.approx((12.0, 8.0))
    assert hsakd["kd"] == (pytest.approx(-1.0), None)
    table = pretraining.format_table([labels, kd, hsakd])
    assert "| hsakd | 0, 1 | 87.00 ± 3.00 | 96.00 ± 1.00 | +12.00 ± 8.00 | -1.00 | 10 |" in table


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pretraining, "CLASSES", 3)
    monkeypatch.setattr(pretraining, "IMAGES", {"train": 4, "val": 2})


def test_pictures_are_drawn_once_and_alike(small, tmp_path):
    for name in ("a", "b"):
        pretraining.draw_task(tmp_path / name)
    files = sorted((tmp_path / "a").rglob("*.png"))
    assert len(files) == 3 * 6
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    assert len({file.read_bytes() for file in files}) == 18
    files[0].unlink()
    with pytest.raises(ValueError, match="holds 17 of 18 pictures; remove it"):
        pretraining.draw_task(tmp_path / "a")


def test_a_finished_run_is_used_again_unless_its_settings_changed(small, tmp_path):
    pretraining.draw_task(tmp_path / "glyphs")
    options = ["HKD.PRETRAINING.EPOCHS", 1, "HKD.PRETRAINING.STUDENT", "wrn-10-1"]
    options += ["HKD.PRETRAINING.TEACHER", "wrn-10-1", "HKD.PRETRAINING.IMAGE_SIZE", 16]
    cfg = pretraining.plan_run("kd", 4, tmp_path, options)
    found = pretraining.run(cfg)
    assert set(found) == {"settings", "student", "teacher", "seconds"}
    assert pretraining.finished(cfg) == found == pretraining.run_all([cfg], 1)[0]
    assert str(tmp_path) not in json.dumps(found)
    for changed in (
        pretraining.plan_run("kd", 4, tmp_path, [*options, "HKD.PRETRAINING.LR", 0.1]),
        pretraining.plan_run("kd", 5, tmp_path, options),
    ):
        assert pretraining.finished(changed) is None


def test_unknown_methods_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'crd' is no method; choose from labels, kd"):
        compare_pretraining.main(["--methods", "crd", "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--methods", "kd", "hsakd"], "hsakd"),
        (["--methods", "kd", "hsakd", "labels"], "hsakd"),
        (["--seeds", "0", "SEED", "3", "SOLVER.BASE_LR"], "SOLVER.BASE_LR"),
    ],
)
def test_words_that_are_no_options(tmp_path, arguments, named):
    with pytest.raises(ValueError, match=f"{named}.* (is no config key|has no value)"):
        compare_pretraining.main(["--output", str(tmp_path), *arguments])
    assert not list(tmp_path.iterdir())
