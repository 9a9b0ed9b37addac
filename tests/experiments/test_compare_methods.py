"""experiments.compare_methods: the whole way in small, used again, stopped, and its sentences."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from experiments import compare_methods as tool
from experiments.methods import FAMILIES, plan_teacher
from experiments.runs import train_all
from helpers.command import run_python
from helpers.rules import rule

pytestmark = rule(
    "Finished runs are used again, changed ones start over, and differences are paired by seed"
)


def test_whole_way_twice(tmp_path, monkeypatch, capsys):
    places = ["--output", str(tmp_path / "out"), "--quickstart", str(tmp_path / "quickstart")]
    common = ["--smoke", "--seeds", "0", *places]
    tool.main([*common, "--methods", "hkd,hkd_citypersons"])
    assert "3 students, 2 at a time" in capsys.readouterr().out

    content = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [row["method"] for row in content["rows"]]
    assert names == ["student", "hkd", "hkd_citypersons"]
    for row in content["rows"][1:]:
        assert list(row["raw"]) == ["pyramid", "region", "logit"]
        for values in (*row["raw"].values(), *row["share"].values()):
            assert min(values) > 0
    assert content["costs"].keys() == {"hkd", "hkd_citypersons"}
    assert all(cost["step"] > 0.5 and cost["memory"] > 1 for cost in content["costs"].values())
    report = (tmp_path / "out" / "results.md").read_text()
    assert report.count("\n| hkd") == 2 and "plain - method" in report
    assert min(Image.open(tmp_path / "out" / "plot.png").size) > 200
    # One config says all that the method changes.
    assert "WEIGHT: 30.0" not in (tmp_path / "out" / "configs" / "hkd.yaml").read_text()

    # A second call trains nothing, and keeps the rows of methods that it was not asked for.
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(tool, "measure_cost", None)
    docs = {name: tmp_path / f"doc_{name}" for name in tool.DOCS}
    monkeypatch.setattr(tool, "DOCS", docs)
    tool.main([*common, "--methods", "hkd", "--docs"])
    assert capsys.readouterr().out.count("already there") == 3  # teacher, student, method
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["rows"] == content["rows"]
    moved = report.replace("(plot.png)", "(doc_plot.png)")
    assert docs["results.md"].read_text() == moved != report and docs["plot.png"].is_file()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--methods", "hdk"], "'hdk' is no method; choose from"),
        (["--seeds", "0,0"], "'0,0' is no list of seeds"),
        (["--jobs", "0"], "--jobs is 0; give a number"),
        (["--cost"], "There is no teacher .*train it first, by make methods"),
    ],
)
def test_mistakes_are_one_sentence(options, sentence, tmp_path):
    places = ["--output", tmp_path / "out", "--quickstart", tmp_path]
    done = run_python("-m", "experiments.compare_methods", *options, *places, status=None)
    assert done.returncode and "Traceback" not in done.stderr
    assert re.search(sentence, done.stderr)


class Child:
    """Stands for a training; says nothing and ends well."""

    def __init__(self, command, **options):
        self.returncode, self.stdout = 0, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_one_failure_does_not_stop_the_others(tmp_path, monkeypatch):
    (tmp_path / "streets").mkdir()
    (tmp_path / "streets" / "streets.json").write_text("{}")
    runs = [plan_teacher(family, tmp_path, True) for family in FAMILIES]

    def start(command, **options):
        child = Child(command)
        child.returncode = 1 if "teacher.yaml" in " ".join(command) else 0
        return child

    monkeypatch.setattr(subprocess, "Popen", start)
    finished = []
    failed = train_all(runs, 2, finished.append)
    assert list(failed) == [runs[0].name] and "ended with status 1" in str(failed[runs[0].name])
    assert finished == [runs[1]]


def test_an_interruption_ends_what_runs(tmp_path, monkeypatch):
    (tmp_path / "streets").mkdir()
    (tmp_path / "streets" / "streets.json").write_text("{}")
    runs = [plan_teacher(family, tmp_path, True) for family in FAMILIES]
    sleepers = []

    real = subprocess.Popen

    def start(command, **options):
        # The first ends at once, the second would sleep.
        wait = 0 if "teacher.yaml" in " ".join(command) else 600
        child = real([sys.executable, "-c", f"import time; time.sleep({wait})"], **options)
        sleepers.append(child)
        return child

    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        train_all(runs, 2, interrupt)
    assert len(sleepers) == 2 and all(child.wait(timeout=30) is not None for child in sleepers)
    assert runs[1].changed() is None
