"""Files that are made to run code or to exhaust the machine, through the commands that read them.

Nothing in them runs; each ends the command in one sentence that names the file.
"""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from helpers.command import forget_loggers
from helpers.pseudo_labelled import write_labelled
from helpers.rules import rule
from helpers.small_detectors import one_stage_config
from hkd_d2.cli.dispatch import main

pytestmark = rule("No file that a command reads runs code, but a .pt2 or .ts that is named")

YAML_CODE = '!!python/object/apply:os.system ["touch ran"]'
DATA = "coco labelled.json images"
MODEL = "--model hostile.pth --config-file plain.yaml"


class Code:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working directory with a data set, plain.yaml and weights that are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HKD_D2_CACHE", str(tmp_path / "cache"))
    write_labelled(tmp_path, 2)
    cfg = one_stage_config("RetinaNet")
    cfg.HKD.DATA.REGISTER = [[tmp_path.name, "coco", "labelled.json", "images"]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (tmp_path.name,)
    Path("plain.yaml").write_text(cfg.dump())
    Path("weights.pth").write_bytes(b"")
    yield
    forget_loggers()


@pytest.fixture
def refused(capsys):
    """Run a command line that is refused; the sentence names ``file``."""

    def run(command, file):
        assert main(command.split()) == 2
        lines = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in lines), lines
        said = lines[-1]  # after what libraries log
        assert said.startswith("hkd ") and file in said and len(said) < 1500, lines
        assert not Path("ran").exists()
        return said

    return run


@pytest.mark.parametrize(
    "command",
    [
        "train --config-file hostile.yaml",
        "train --config-file above.yaml",
        "train --config-file plain.yaml MODEL.META_ARCHITECTURE HKDDetector "
        "HKD.STUDENT.META_ARCHITECTURE RetinaNet HKD.TERMS ['pyramid'] "
        "HKD.TEACHER.CONFIG_FILE hostile.yaml HKD.TEACHER.WEIGHTS weights.pth",
        "pretrain --config-file hostile.yaml",
        "evaluate --model weights.pth --config-file hostile.yaml",
        "label --model weights.pth --config-file hostile.yaml --images images --out new.json",
        "export --model weights.pth --config-file hostile.yaml",
        "export --model beside/weights.pth",
        "detect --model weights.pth --config-file hostile.yaml images",
        "detect --model beside/weights.pth images",
        "serve --model weights.pth --config-file hostile.yaml --port 0",
        f"benchmark --model weights.pth --config-file hostile.yaml --data {DATA}",
        "count hostile.yaml",
        "data crop --config-file hostile.yaml --out new",
        f"data view {DATA} --config-file hostile.yaml",
    ],
)
def test_code_in_a_config(refused, command):
    Path("hostile.yaml").write_text(f"SEED: {YAML_CODE}\n")
    Path("above.yaml").write_text("_BASE_: hostile.yaml\n")
    Path("beside").mkdir()
    Path("beside/config.yaml").write_text(f"SEED: {YAML_CODE}\n")
    Path("beside/weights.pth").write_bytes(b"")
    file = "beside/config.yaml" if "beside" in command else "hostile.yaml"
    assert "runs no code" in refused(command, file)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("_BASE_: hostile.yaml\n", "its own base"),
        ("A: " + "[" * 100_000 + "\n", "nested more deeply"),
        ("[" * 100_000, "nested more deeply"),
        ('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "/etc/passwd">]><a>&b;</a>', ""),
        ("SEED: 1\n" * 100_000, "larger than"),
    ],
)
def test_other_configs(refused, content, reason):
    Path("hostile.yaml").write_text(content)
    for command in ("train --config-file", "count", "pretrain --config-file"):
        assert reason in refused(f"{command} hostile.yaml", "hostile.yaml")


COMMANDS = [
    "evaluate {}",
    "label {} --images images --out new.json",
    "export {}",
    "detect {} images",
    "serve {} --port 0",
    "train --config-file plain.yaml --out new MODEL.WEIGHTS hostile{}",
]


def write_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for part in ("data.pkl", "version", "hkd_d2.json"):
            archive.writestr(f"a/{part}", bytes(2**27))


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".npy"])
@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_a_checkpoint(refused, command, suffix):
    Path(f"hostile{suffix}").write_bytes(pickle.dumps({"model": {"a": Code()}}))
    words = f"--model hostile{suffix} --config-file plain.yaml"
    refused(command.format(suffix if "WEIGHTS" in command else words), f"hostile{suffix}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_zip_bomb_as_a_checkpoint(refused, command):
    write_bomb("hostile.pth")
    said = refused(command.format(".pth" if "WEIGHTS" in command else MODEL), "hostile.pth")
    assert "far more than its size" in said


@pytest.mark.parametrize("suffix", [".ts", ".pt2"])
def test_a_zip_bomb_as_a_program(refused, suffix):
    write_bomb(f"hostile{suffix}")
    said = refused(f"detect --model hostile{suffix} images", f"hostile{suffix}")
    assert "far more than its size" in said


@pytest.mark.parametrize("suffix", [".onnx", ".ts", ".pt2", ".safetensors"])
def test_code_in_an_exported_file(refused, suffix):
    Path(f"hostile{suffix}").write_bytes(pickle.dumps({"model": {"a": Code()}}))
    words = " --config-file plain.yaml" if suffix == ".safetensors" else ""
    refused(f"detect --model hostile{suffix}{words} images", f"hostile{suffix}")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"images": ' + '{"a":' * 100_000,
        '{"images": [{"id": ' + "9" * 100_000 + "}]}",
        '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>',
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        "score hostile.json labelled.json",
        "score labelled.json hostile.json",
        "analyze labelled.json hostile.json",
        "data view coco hostile.json images",
        "data split hostile.json --by-folder a --out new.json",
        "data crop --out new --train coco hostile.json images --val coco hostile.json images",
        "train --config-file plain.yaml HKD.DATA.PSEUDO ['hostile.json']",
    ],
)
def test_annotations(refused, command, content):
    Path("hostile.json").write_text(content)
    refused(command, "hostile.json")


def test_matlab_files_that_unpack_without_bound(refused, capsys):
    zeros = np.zeros((2**15, 2**11))  # half a gigabyte
    variables = {"gt": zeros, "A": zeros, "anno_val_aligned": zeros}
    with open("gt-All.mat", "wb") as file:
        scipy.io.savemat(file, variables, do_compression=True)
    said = refused("score gt-All.mat labelled.json --protocol caltech", "gt-All.mat")
    assert "unpacks to more than 256 MiB" in said
    Path("cp/annotations").mkdir(parents=True)
    Path("gt-All.mat").rename("cp/annotations/anno_val.mat")
    assert main("data check citypersons cp val".split()) == 1
    assert "unpacks to more than 256 MiB" in capsys.readouterr().out
