"""What is compared: files found, their nodes laid over the small students, rows of runs."""

import json

import pytest
import yaml

from experiments.methods import (
    FAMILIES,
    choose_methods,
    ends,
    find_family,
    find_methods,
    overlay,
    plan_contenders,
    read_row,
)
from experiments.runs import CONFIGS, flatten, read_config
from helpers.rules import rule

pytestmark = rule("A method is compared by its own HKD node, on the small student's levels")

TWO_STAGE, RETINANET = FAMILIES


@pytest.fixture
def method(tmp_path):
    """Write a method's file; returns its path."""

    def write(base, name="mine", **content):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"_BASE_": str(CONFIGS / base), **content}))
        return file

    return write


def test_every_method_has_a_small_pair():
    found = find_methods()
    assert {"adl", "hkd", "hkd_citypersons", "hkd_retinanet_citypersons"} <= found.keys()
    assert len(found) == len(list((CONFIGS / "methods").glob("*.yaml"))) + 3
    for file in found.values():
        assert find_family(file) in FAMILIES


def test_unknown_names_and_families_are_refused(method):
    with pytest.raises(ValueError, match="'fgif' is no method; choose from adl"):
        choose_methods(["adl", "fgif"])
    assert list(choose_methods(["hkd", "adl"])) == ["hkd", "adl"]
    with pytest.raises(ValueError, match="distils a IgnoreAwareFCOS, and configs/quickstart"):
        find_family(method("hkd_fcos_citypersons.yaml"))


def test_the_methods_node_and_nothing_of_its_detector(method):
    file = method(
        "hkd_citypersons.yaml",
        HKD={"REGION": {"WEIGHT": 7.0}, "TEACHER": {"PRECISION": "bf16"}},
    )
    changes = overlay(file, TWO_STAGE, 450)
    assert changes["MODEL"] == {"META_ARCHITECTURE": "HKDDetector"}
    assert changes["HKD"]["TERMS"] == ["pyramid", "region", "logit"]
    assert changes["HKD"]["REGION"] == {"WEIGHT": 7.0}
    teacher = str(CONFIGS / "quickstart" / "teacher.yaml")
    assert changes["HKD"]["TEACHER"] == {"PRECISION": "bf16", "CONFIG_FILE": teacher}
    # The large student has a body of its own, pretrained, and no clipping.
    assert not {"BACKBONE", "DATA", "SOLVER"} & changes["HKD"].keys()
    assert "SOLVER" not in changes


def test_levels_and_iterations_are_the_small_students(method):
    file = method(
        "hkd_retinanet_citypersons.yaml",
        HKD={
            "PYRAMID": {
                "LEVELS": ["p3", "p7"],
                # 5952 iterations become 372, a sixteenth.
                "SCHEDULE": {"WARMUP_ITERS": 160, "STOP_ITER": 1600},
            }
        },
        SOLVER={"CLIP_GRADIENTS": {"ENABLED": True, "CLIP_VALUE": 3.0}},
    )
    changes = overlay(file, RETINANET, 372)
    pyramid = changes["HKD"]["PYRAMID"]
    assert pyramid["LEVELS"] == ["p2", "p6"]
    assert pyramid["SCHEDULE"] == {"WARMUP_ITERS": 10, "STOP_ITER": 100}
    assert changes["SOLVER"]["CLIP_GRADIENTS"]["CLIP_VALUE"] == 3.0


def test_terms_that_are_not_named_change_nothing(method):
    """Numbers of iterations of an idle term would shrink with the run as well."""
    file = method("hkd_citypersons.yaml", HKD={"TERMS": ["adl"], "HSAKD": {"TEACHER_ITERS": 800}})
    assert overlay(file, TWO_STAGE, 450)["HKD"].keys() == {"TERMS", "TEACHER"}
    # 5952 iterations become 450: 1488, a quarter, becomes 112.
    file = CONFIGS / "methods" / "hsakd.yaml"
    assert overlay(file, TWO_STAGE, 450)["HKD"]["HSAKD"]["TEACHER_ITERS"] == 112


def test_contenders_differ_by_their_method_alone(tmp_path):
    (tmp_path / "streets").mkdir()
    chosen = choose_methods(["hkd_citypersons", "adl"])
    plans = plan_contenders(chosen, [0, 4], tmp_path, tmp_path / "out", 450)
    assert [c.name for c in plans] == ["student", "hkd_citypersons", "student_retinanet", "adl"]
    assert [c.plain for c in plans] == [True, False, True, False]
    for plain, distilled in (plans[:2], plans[2:]):
        a, b = (flatten(c.runs[1].config) for c in (plain, distilled))
        differ = {k for k in a if a[k] != b[k]} - {"OUTPUT_DIR"}
        assert differ and all(k.startswith(("HKD.", "MODEL.META_ARCH")) for k in differ)
        assert b["SEED"] == 4 and b["SOLVER.MAX_ITER"] == 450
        teacher = tmp_path / plain.family.teacher / "model_final.pth"
        assert b["HKD.TEACHER.WEIGHTS"] == str(teacher)
        # The config file alone is the method, without the places of this comparison.
        assert read_config(distilled.config_file, []).HKD.TEACHER.WEIGHTS == ""


def test_a_share_of_the_labels_is_a_section(tmp_path):
    names = ["sad_supervised", "sad_hard", "sad"]
    plans = plan_contenders(choose_methods(names), [0], tmp_path, tmp_path / "out", 5)
    student, supervised, hard, sad = plans
    assert student.section == "RetinaNet" and student.plain
    assert {c.section for c in plans[1:]} == {"RetinaNet, 10 % of the labels"}
    assert [c.plain for c in plans[1:]] == [True, False, False]
    pool = tmp_path / "out" / "pool_teacher_retinanet.json"
    assert supervised.pool is None and hard.pool == sad.pool == pool
    for contender, named in ((supervised, []), (hard, [str(pool)]), (sad, [str(pool)])):
        data = contender.runs[0].config.HKD.DATA
        assert data.LABELED_SHARE == 0.1 and list(data.PSEUDO) == named
    assert sad.terms == ["adl"] and hard.terms == []


def test_another_place_of_the_pool_changes_nothing(tmp_path):
    (tmp_path / "streets").mkdir()
    (tmp_path / "streets" / "streets.json").write_text("{}")
    run = plan_contenders(choose_methods(["sad"]), [0], tmp_path, tmp_path, 5)[1].runs[0]
    pool = tmp_path / "pool_teacher_retinanet.json"
    pool.write_text("one")
    before = run.settings()
    assert str(tmp_path) not in json.dumps(before)
    pool.write_text("another")
    after = run.settings()
    assert {k for k in after if after[k] != before[k]} == {"the teacher's detections (0)"}


def test_where_the_repository_stands_changes_nothing(tmp_path):
    (tmp_path / "streets").mkdir()
    (tmp_path / "streets" / "streets.json").write_text("{}")
    contender = plan_contenders(choose_methods(["pkd"]), [0], tmp_path, tmp_path, 5)[1]
    assert "configs/quickstart/teacher.yaml" in contender.description
    assert str(CONFIGS) not in contender.description
    run = contender.runs[0]
    run.folder.mkdir(parents=True)
    run.weights.touch()
    settings = run.settings()
    for place, changed in (("/other/configs/quickstart/teacher", []), ("mine", ["teacher"])):
        settings["HKD.TEACHER.CONFIG_FILE"] = f"{place}.yaml"
        run.record.write_text(json.dumps({"settings": settings, "seconds": 1.0}))
        assert run.changed() == (changed and ["HKD.TEACHER.CONFIG_FILE"])


def test_the_protocols_own_missing_point_is_no_change(tmp_path):
    """An older run has the rule in the config and no protocol."""
    (tmp_path / "streets").mkdir()
    (tmp_path / "streets" / "streets.json").write_text("{}")
    run = plan_contenders(choose_methods(["pkd"]), [0], tmp_path, tmp_path, 5)[1].runs[0]
    run.folder.mkdir(parents=True)
    run.weights.touch()
    settings = run.settings()
    del settings["HKD.EVALUATION.PROTOCOL"]
    for point, changed in (("official", []), ("matlab", ["HKD.EVALUATION.MISSING_POINT"])):
        settings["HKD.EVALUATION.MISSING_POINT"] = point
        run.record.write_text(json.dumps({"settings": settings, "seconds": 1.0}))
        assert run.changed() == changed


def test_row_of_a_run(tmp_path):
    plans = plan_contenders(choose_methods(["adl"]), [0], tmp_path, tmp_path / "out", 450)
    run = plans[1].runs[0]
    run.folder.mkdir(parents=True)
    # Twenty entries 20, 19, .., 1: the first fifth has the mean 18.5, the last 2.5.
    lines = [
        {"iteration": 20 * i, "hkd/adl_raw": 20.0 - i, "hkd_gradient_share/loss_hkd_adl": 0.25}
        for i in range(20)
    ]
    scores = {"Reasonable": 60.0, "Reasonable_occ=heavy": 80.0, "All": 70.0}
    lines.append({"bbox/AP": 12.5, **{f"miss_rate/{k}": v for k, v in scores.items()}})
    (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    run.record.write_text(json.dumps({"settings": {}, "seconds": 33.0}))
    assert read_row(plans[1], run) == {
        "method": "adl",
        "section": "RetinaNet",
        "plain": False,
        "seed": 0,
        "Reasonable": 60.0,
        "Heavy": 80.0,
        "All": 70.0,
        "AP": 12.5,
        "seconds": 33.0,
        "raw": {"adl": (18.5, 2.5)},
        "share": {"adl": (0.25, 0.25)},
    }
    assert ends(lines, "nothing") is None
    # What does not act yet, or finds nothing, does not count; what is always 0 is 0.
    assert ends([{"x": 0.0}, {"x": 3.0}, {"x": 0.0}, {"x": 1.0}], "x") == (3.0, 1.0)
    assert ends([{"x": 0.0}] * 9, "x") == (0.0, 0.0)
