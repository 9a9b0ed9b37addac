"""torchrun beside Detectron2's launch: one group, one folder, and a restart that goes on."""

import contextlib
from pathlib import Path

import pytest
import torch
from engine.test_stopped_runs import distilling

from helpers.command import hkd, run_python
from helpers.runs import same_end
from hkd_d2.engine import processes
from hkd_d2.modeling.checkpoint import read_checkpoint

DYING = Path(__file__).parents[1] / "helpers" / "dying_training.py"


@pytest.mark.slow
def test_torchrun_and_a_restart_equal_launch(tmp_path):
    """One of two processes is killed; the restarted ones end where undisturbed ones end."""
    cfg = distilling("mgd", tmp_path)  # whose masks each process draws for itself
    cfg.MODEL.RESNETS.NORM = "BN"  # whose running statistics each process has for itself
    cfg.SOLVER.MAX_ITER = 12
    (tmp_path / "run.yaml").write_text(cfg.dump())
    words = ["--config-file", tmp_path / "run.yaml", "--out"]
    hkd("train", *words, tmp_path / "launch", "--num-gpus", 2, "--dist-url", "auto")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    run_python(*torchrun, "--max-restarts", 3, DYING, *words, tmp_path / "torchrun")
    assert same_end(tmp_path / "launch", tmp_path / "torchrun") == []
    states = read_checkpoint(tmp_path / "torchrun" / "model_final.pth")["processes"]
    assert len(states) == 2 and states[0]["random"] != states[1]["random"]
    assert states[1]["buffers"]["model"]
    assert sorted(p.name for p in (tmp_path / "torchrun").glob("log.txt*")) == [
        "log.txt",
        "log.txt.rank1",
    ]
    assert "Starting training from iteration 8" in (tmp_path / "torchrun/log.txt").read_text()
    # Both ways at once would start processes of processes.
    done = run_python(
        *torchrun, "-m", "hkd_d2", "train", *words, tmp_path / "x", "--num-gpus", 2, status=None
    )
    assert done.returncode != 0 and "torchrun starts the processes itself" in done.stderr


@pytest.mark.parametrize(
    "other, sentence",
    [
        ({"first iteration": 0}, "The first iteration of process 0 is 10 and that of process 1 is"),
        ({"config": "f00"}, "The config of process 0 is .* and that of process 1 is f00"),
        ({"parameters": "f00"}, "The parameters of process 0"),
        ({}, None),
    ],
)
def test_processes_that_disagree(other, sentence, student_cfg, monkeypatch):
    monkeypatch.setattr(processes.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.comm, "all_gather", lambda own: [own, own | other])
    with pytest.raises(ValueError, match=sentence) if sentence else contextlib.nullcontext():
        processes.check_agreement(10, torch.nn.Linear(2, 2), student_cfg)


def test_paths_and_workers_are_a_machines_own(student_cfg):
    first = processes.config_hash(student_cfg)
    elsewhere = student_cfg.clone()
    elsewhere.OUTPUT_DIR, elsewhere.DATALOADER.NUM_WORKERS = "/scratch/run", 7
    elsewhere.HKD.DATA.REGISTER = [["a", "coco", "/here/a.json", "/here"]]
    assert processes.config_hash(elsewhere) == first
    elsewhere.SOLVER.BASE_LR *= 2
    assert processes.config_hash(elsewhere) != first


def test_a_failure_of_one_process_is_that_of_all(monkeypatch):
    monkeypatch.setattr(processes.comm, "all_gather", lambda own: [own, "no such file"])
    with pytest.raises(ValueError, match="no such file"):
        processes.on_all_processes(lambda: 3)
    monkeypatch.setattr(processes.comm, "all_gather", lambda own: [own, ""])
    assert processes.on_all_processes(lambda: 3) == 3
    with pytest.raises(FileNotFoundError, match="here"):
        processes.on_all_processes(lambda: open("/nowhere/here"))
