"""hkd train and evaluate: mistakes of a config or a machine, found before a process starts."""

import os
import socket
from pathlib import Path

import pytest
import torch

from hkd_d2.cli.dispatch import main
from hkd_d2.engine import run as engine_run

CONFIG = ["train", "--config-file", "quickstart/student.yaml"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")

    def launch(*arguments, **options):
        raise AssertionError("nothing is to be launched")

    monkeypatch.setattr(engine_run, "launch", launch)


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["MODEL.DEVICE", "kpu"], "MODEL.DEVICE is 'kpu'; give cpu, cuda or cuda:N."),
        (["MODEL.DEVICE", "meta"], "MODEL.DEVICE is 'meta'; give cpu"),
        (["SOLVER.AMP.ENABLED", "True"], "SOLVER.AMP.ENABLED needs a GPU and MODEL.DEVICE is cpu"),
        (["OUTPUT_DIR", "file"], "OUTPUT_DIR is 'file', where nothing can be written"),
        (["OUTPUT_DIR", "file/below"], "OUTPUT_DIR is 'file/below', where nothing"),
        (["--out", "/proc/here"], "OUTPUT_DIR is '/proc/here', where nothing can be written"),
        (["SOLVER.MAX_ITER"], "'SOLVER.MAX_ITER' has no value; give KEY VALUE"),
        (["SEED", "1", "--num-gpus", "2"], "'--num-gpus' stands where a config key belongs"),
        (["--num-gpus", "0"], "is less than 1; give 1 or more"),
        (["--machine-rank", "1"], "--machine-rank is 1; of 1 machines give 0 to 0"),
        (["--num-gpus", "2", "SOLVER.IMS_PER_BATCH", "3"], "is 3, which 2 processes cannot share"),
        (["--num-gpus", "2", "--dist-url", "tcp://127.0.0.1:70000"], "give tcp://HOST:PORT"),
        (["--num-gpus", "2", "--dist-url", "tcp://127.0.0.1"], "give tcp://HOST:PORT"),
        (["--num-gpus", "2", "--dist-url", "tcp://127.0.0.1:{taken}"], "port {taken} ("),
        (["SOLVER.MAX_ITERS", "3"], "SOLVER.MAX_ITERS"),
    ],
)
def test_one_sentence_before_anything_starts(words, sentence, taken, capsys):
    assert main([*CONFIG, *(word.format(taken=taken) for word in words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hkd train: ") and said.count("\n") == 1
    assert sentence.format(taken=taken) in said


def test_no_config(capsys):
    assert main(["train"]) == 2
    assert "name one with --config-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--num-gpus", "2"], "--num-gpus is 2 and this machine has 1; give 1 at most"),
        (["MODEL.DEVICE", "cuda:1"], "MODEL.DEVICE is cuda:1 and this machine has 1, counted"),
    ],
)
def test_more_gpus_than_there_are(words, sentence, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main([*CONFIG, *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main([*CONFIG, "MODEL.DEVICE", "cuda"]) == 2
    assert "MODEL.DEVICE is cuda and no GPU is found" in capsys.readouterr().err


def test_what_is_launched(monkeypatch):
    """The whole command line, for every process; evaluation of the student alone."""
    launched = []
    monkeypatch.setattr(engine_run, "launch", lambda *a, **options: launched.append((a, options)))
    assert main([*CONFIG, "--num-gpus", "2", "--dist-url", "auto", "SEED", "7"]) == 0
    ((function, number), options) = launched.pop()
    assert function is engine_run.run_process and number == 2
    assert options["dist_url"] == "auto"
    cfg = engine_run.read_config(*options["args"])
    assert cfg.SEED == 7 and cfg.SOLVER.MAX_ITER == 2000

    words = ["evaluate", "--model", "x/model.pth", "--config-file", "hkd_citypersons.yaml"]
    words += ["--data", "citypersons", "some/where", "val", "--out", "o", "MODEL.DEVICE", "cpu"]
    assert main(words) == 0
    ((_, number), options) = launched.pop()
    (args,) = options["args"]
    cfg = engine_run.read_config(args)
    assert number == 1 and args.eval_only and not args.resume
    assert cfg.MODEL.META_ARCHITECTURE != "HKDDetector"
    assert (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.MODEL.DEVICE) == ("x/model.pth", "o", "cpu")
    assert cfg.DATASETS.TEST == ("citypersons_where_val",)
    assert os.path.isdir("o")


def test_an_exported_file_is_not_evaluated(capsys):
    assert main(["evaluate", "--model", "model.onnx"]) == 2
    assert "score it with hkd benchmark" in capsys.readouterr().err
