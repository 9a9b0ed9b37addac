"""All commands: their help, their sentence for what is not there, and the names in tools/."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hkd_d2 import __version__
from hkd_d2.cli import dispatch
from hkd_d2.cli.arguments import add_data, add_options, config_options, split_configs
from hkd_d2.cli.dispatch import COMMANDS, main, run_command

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def run(*words, module="hkd_d2", **options):
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        **options,
    )


@pytest.mark.parametrize("words", [(), ("--help",), ("data",)])
def test_the_overview_fits_a_screen(words):
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    for name in COMMANDS:
        assert words == ("data",) and " " not in name or f"  {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_is_quiet(name, monkeypatch, capsys, recwarn):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: hkd {name} ")
    assert said.err == "" and not recwarn.list


def test_no_command_needs_pytorch_for_its_help():
    """Which is why help and completion answer at once."""
    code = (
        "import sys; sys.modules.update(torch=None, detectron2=None)\n"
        "from hkd_d2.cli.dispatch import COMMANDS, whole_parser\n"
        "for name in COMMANDS: print(len(whole_parser(name.split()).format_help()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(COMMANDS)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hkd_d2 {__version__}\n"


def test_another_word_is_refused_with_the_nearest_command(capsys):
    assert main(["exprt", "x"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "there is no command 'exprt'; did you mean 'export'?" in said.err
    assert main(["data", "chek"]) == 2
    assert "'data chek'; did you mean 'data check'?" in capsys.readouterr().err


# What each command is given that is not there.
MISSING = {
    "train": ["--config-file", "none.yaml"],
    "evaluate": ["--model", "none.pth"],
    "score": ["none.json", "none.json"],
    "analyze": ["none.json", "none.json"],
    "label": ["--model", "none.pth", "--images", "none", "--out", "out.json"],
    "pretrain": ["--config-file", "none.yaml"],
    "export": ["--model", "none.pth"],
    "quantize": ["--model", "none.onnx", "--calibration", "citypersons", "none", "val"],
    "detect": ["--model", "none.onnx", "none.png"],
    "serve": ["--model", "none.onnx", "--port", "0"],
    "count": ["none.yaml"],
    "benchmark": ["--model", "none.onnx", "--data", "citypersons", "none", "val"],
    "data check": ["citypersons", "none"],
    "data view": ["citypersons", "none", "val"],
    "data crop": ["--config-file", "none.yaml", "--out", "out"],
    "data split": ["none.json", "--by-folder", "a", "--out", "out.json"],
    "data streets": ["--out", "file/none"],
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_one_sentence_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    assert {*MISSING} == {*COMMANDS} - {"info"}
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main([*name.split(), *MISSING[name]]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"hkd {name}: ") and said.err.count("\n") == 1
    assert "none" in said.err and said.out == ""
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("name", MISSING)
def test_words_that_make_no_sense_are_one_sentence(name, capsys):
    assert main([*name.split(), "--no-such-option"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"hkd {name}: ") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    "tool, words",
    [
        ("train_net.py", MISSING["train"]),
        ("evaluate_miss_rate.py", MISSING["score"]),
        ("export.py", ["--weights=none.pth"]),
        ("demo.py", MISSING["detect"]),
        ("count_model.py", ["none.yaml", "--opts", "SEED", "1"]),
        ("prepare_data.py", ["citypersons", "--root", "none"]),
    ],
)
def test_the_names_in_tools(tool, words, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *words],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{tool}: ") and done.stderr.count("\n") == 1
    assert "none" in done.stderr


def test_nothing_else_is_in_tools():
    wanted = "train_net evaluate_miss_rate export demo count_model prepare_data benchmark_ops "
    wanted += "profile_step quickstart"
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} == {*wanted.split()}
    for path in (ROOT / "tools").glob("*.py"):
        assert len(path.read_text().splitlines()) < 20, path


def test_train_takes_detectron2s_own_arguments():
    from detectron2.engine import default_argument_parser

    def facts(parser):
        return {
            a.dest: (a.option_strings, a.nargs, a.const, a.type)
            for a in parser._actions
            if a.dest not in ("help", "out")
        }

    parser = dispatch.Parser(prog="hkd train")
    dispatch.command_module("train").add_arguments(parser)
    theirs = default_argument_parser()
    assert facts(parser) == facts(theirs)
    words = ["--config-file", "a.yaml", "--num-gpus", "2", "--resume", "SEED", "1"]
    found = vars(parser.parse_args(words))
    assert found.pop("out") is None
    assert found == vars(theirs.parse_args(words))


# ------------------------------------------------------------------------------------- arguments
def parse(words):
    parser = argparse.ArgumentParser()
    add_data(parser, "--data", "data")
    parser.add_argument("--out")
    add_options(parser)
    args = parser.parse_args(words)
    return args.data, config_options(args)


@pytest.mark.parametrize(
    "words, data, options",
    [
        (["--data", "a_val"], ["a_val"], []),
        (["--data", "coco", "A.json", "IMAGES"], ["coco", "A.json", "IMAGES"], []),
        (["--data", "a_val", "SEED", "1"], ["a_val"], ["SEED", "1"]),
        (["--data", "coco", "a", "b", "A.B", "x"], ["coco", "a", "b"], ["A.B", "x"]),
        (["--data", "a_val", "--out", "o", "A.b_C", "x"], ["a_val"], ["A.b_C", "x"]),
        (["A.B", "x"], None, ["A.B", "x"]),
        ([], None, []),
    ],
)
def test_data_and_the_options_behind_it(words, data, options):
    assert parse(words) == (data, options)


def test_data_of_two_words(capsys):
    words = ["--model", "a.onnx", "--calibration", "citypersons", "val"]
    assert main(["quantize", *words]) == 2
    assert "--calibration takes the name of a registered data set or FORMAT SOURCE PART, not " in (
        capsys.readouterr().err
    )


def test_config_options_that_are_none():
    with pytest.raises(ValueError, match="'SEED' has no value; give KEY VALUE"):
        parse(["A.B", "x", "SEED"])
    with pytest.raises(ValueError, match="'--out' stands where a config key belongs"):
        parse(["A.B", "x", "--out", "o"])
    with pytest.raises(ValueError, match="'a.b' stands where"):
        parse(["a.b", "x"])


def test_configs_come_before_the_options():
    words = ["a.yaml", "b.yml", "HKD.TEACHER.CONFIG_FILE", "c.yaml"]
    assert split_configs(words) == (words[:2], words[2:])
    assert split_configs(["a", "b.yaml"]) == (["a", "b.yaml"], [])
    assert split_configs(["SEED", "1"]) == ([], ["SEED", "1"])


def test_completion():
    argcomplete = pytest.importorskip("argcomplete")
    assert argcomplete
    line = "hkd data str"
    environment = ENVIRONMENT | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": os.devnull,
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    found = {}
    for line in ("hkd data str", "hkd export --mo"):
        environment |= {"COMP_LINE": line, "COMP_POINT": str(len(line))}
        done = subprocess.run(
            ["bash", "-c", f'exec "{sys.executable}" -m hkd_d2 8>&1 9>&2'],
            env={k: v for k, v in environment.items() if k != "_ARGCOMPLETE_STDOUT_FILENAME"},
            capture_output=True,
            text=True,
        )
        found[line] = done.stdout.split()
    assert found == {"hkd data str": ["streets"], "hkd export --mo": ["--model"]}


def test_info_says_what_is_compiled(capsys):
    assert run_command("info", []) == 0
    said = capsys.readouterr().out
    for word in ("Python", "PyTorch", "detectron2", "GPU", "modules", "roi_distillation"):
        assert word in said


def test_json_of_score_through_the_entry_point(tmp_path, capsys):
    """The command's own exit code and output come through."""
    rows = {"images": [{"id": i} for i in range(10)]}
    missed = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 40, 100], "height": 100}
    rows["annotations"] = [missed | {"vis_ratio": 1, "ignore": 0}]
    rows["categories"] = [{"id": 1, "name": "pedestrian"}]
    (tmp_path / "gt.json").write_text(json.dumps(rows))
    (tmp_path / "found.json").write_text("[]")
    files = [str(tmp_path / "gt.json"), str(tmp_path / "found.json")]
    assert main(["score", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["Reasonable"] == 100
