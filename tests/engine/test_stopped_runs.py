"""Trainings in processes of their own that are killed, stopped and resumed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine.test_resume import with_pictures

from helpers.command import environment, hkd
from helpers.runs import same_end, train
from helpers.small_detectors import one_stage_config, save_teacher, small_config
from hkd_d2.modeling.checkpoint import read_checkpoint

SLOW = Path(__file__).parents[1] / "helpers" / "slow_training.py"


def distilling(kind, folder):
    """A config that distils, with data and a teacher in ``folder``."""
    if kind in ("IgnoreAwareRetinaNet", "IgnoreAwareFCOS"):
        cfg = one_stage_config(kind)
        teacher = one_stage_config(kind, channels=32, width=0.5)
        cfg.HKD.TERMS = ["pyramid", "logit"]
    else:
        cfg, teacher = small_config(), small_config(channels=32, hidden=40, width=0.5)
        cfg.HKD.TERMS = ["pyramid", "region", "logit"] if kind == "hkd" else [kind]
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = save_teacher(teacher, folder)
    cfg = with_pictures(cfg, folder)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 14, 4
    cfg.HKD.HSAKD.TEACHER_ITERS = 6
    cfg.HKD.SOLVER.KEEP_CHECKPOINTS = 2
    return cfg


class Run:
    """A slow training in a folder, started again and again."""

    def __init__(self, cfg, place, *words):
        place.mkdir()
        self.place, self.out = place, place / "out"
        (place / "run.yaml").write_text(cfg.dump())
        self.words = ["--config-file", str(place / "run.yaml"), "--out", str(self.out), *words]

    def start(self, *words):
        command = [sys.executable, str(SLOW), *self.words, *words]
        log = open(self.place / "output.txt", "a")  # noqa: SIM115  as long as the process
        return subprocess.Popen(command, cwd=self.place, env=environment(), stdout=log, stderr=log)

    def wait_for(self, process, what, seconds=120):
        end = time.monotonic() + seconds
        while not what():
            assert process.poll() is None, (self.place / "output.txt").read_text()[-3000:]
            assert time.monotonic() < end, (self.place / "output.txt").read_text()[-3000:]
            time.sleep(0.005)

    def done(self):
        """Iterations that are in the log of the run's checkpoints."""
        return len(list(self.out.glob("model_*.pth")))

    def stop(self, number, while_writing, generator):
        """Resume, and end it by a signal in the midst of a step or of a checkpoint."""
        process = self.start("--resume")
        before = {p.name for p in self.out.glob("model_*.pth")}
        flag = self.place / "writing"
        if while_writing:
            self.wait_for(process, flag.exists)
            time.sleep(generator.uniform(0, 0.2))
        else:
            self.wait_for(
                process,
                lambda: {p.name for p in self.out.glob("model_*.pth")} - before,
            )
            time.sleep(generator.uniform(0, 0.3))
        process.send_signal(number)
        return process.wait(120)

    def finish(self):
        process = self.start("--resume")
        assert process.wait(300) == 0, (self.place / "output.txt").read_text()[-3000:]


@pytest.mark.long
def test_killed_and_stopped_runs_end_alike(tmp_path):
    """Killed inside a checkpoint, stopped by SIGTERM and SIGINT, of a detector with TorchScript."""
    cfg = distilling("IgnoreAwareRetinaNet", tmp_path)
    train(cfg, tmp_path / "whole")
    run, generator = Run(cfg, tmp_path / "stopped"), random.Random(0)
    assert run.stop(signal.SIGTERM, False, generator) == 143
    last = (run.out / "last_checkpoint").read_text()
    assert read_checkpoint(run.out / last)["trainer"]["iteration"] == int(last[6:13])
    assert run.stop(signal.SIGKILL, True, generator) == -signal.SIGKILL
    left = [p.name for p in run.out.glob("part-*/*")]
    assert run.stop(signal.SIGINT, False, generator) in (130, 0)
    assert len(left) == 1 and f"Removed '{left[0]}'" in (run.place / "output.txt").read_text()
    run.finish()
    assert same_end(tmp_path / "whole", run.out) == []
    assert not list(run.out.glob("part-*")) and run.done() <= 3
    # The finished run is not begun anew unasked, and its folder is in use by one at a time.
    refused = hkd("train", *run.words, status=2).stderr
    assert "has a training already" in refused and "\n" not in refused.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, workers",
    [
        ("hkd", 0),
        ("mgd", 2),
        ("osakd", 0),
        ("lwkd", 2),
        ("hsakd", 0),
        ("IgnoreAwareRetinaNet", 2),
        ("IgnoreAwareFCOS", 0),
    ],
)
def test_three_kills_each(kind, workers, tmp_path):
    """Twenty-one SIGKILLs in all, seven of them inside the writing of a checkpoint."""
    cfg = distilling(kind, tmp_path)
    cfg.DATALOADER.NUM_WORKERS = workers
    train(cfg, tmp_path / "whole")
    run, generator = Run(cfg, tmp_path / "killed"), random.Random(f"{kind} {workers}")
    for while_writing in (True, False, False):
        assert run.stop(signal.SIGKILL, while_writing, generator) == -signal.SIGKILL
    run.finish()
    assert same_end(tmp_path / "whole", run.out) == []


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    cfg = distilling("hkd", tmp_path)
    run = Run(cfg, tmp_path / "stopped")
    process = run.start()
    run.wait_for(process, (run.place / "writing").exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not (run.out / "last_checkpoint").exists()


def test_a_folder_in_use(tmp_path):
    cfg = distilling("hkd", tmp_path)
    run = Run(cfg, tmp_path / "used")
    process = run.start()
    run.wait_for(process, (run.out / "log.txt").exists)
    try:
        refused = hkd("train", *run.words, "--resume", status=2).stderr
        assert f"is in use by process {process.pid} on" in refused
    finally:
        process.kill()
        process.wait(60)
