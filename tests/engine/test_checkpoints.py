"""Checkpoints of a run: written whole, read back, the last ones kept, and found again."""

import errno
import logging
import shutil

import pytest
import torch
from engine.test_resume import with_pictures
from torch import nn

from helpers.rules import rule
from helpers.runs import resumed_copy, same_end, train
from helpers.small_detectors import one_stage_config, small_config
from hkd_d2.modeling import checkpoint
from hkd_d2.modeling.checkpoint import StudentCheckpointer, read_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of a plain student and its config."""
    folder = tmp_path_factory.mktemp("finished")
    cfg = with_pictures(small_config(), folder)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 6, 2
    train(cfg, folder / "run")
    return cfg, folder / "run"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20000])


@pytest.mark.parametrize("harm", [cut, flip, "unlink"])
def test_an_older_whole_checkpoint_is_taken(whole, harm, tmp_path, caplog):
    cfg, run = whole
    part = resumed_copy(run, tmp_path / "part", "model_0000001.pth")
    shutil.copy(run / "model_0000003.pth", part)
    (part / "last_checkpoint").write_text("model_0000003.pth")
    bad = part / "model_0000003.pth"
    bad.unlink() if harm == "unlink" else harm(bad)
    trainer = train(cfg, part, resume=True)
    assert trainer.start_iter == 2 and same_end(run, part) == []
    warnings = [r for r in caplog.records if "Resuming from" in r.getMessage()]
    assert len(warnings) == 1 and "model_0000003.pth" in warnings[0].getMessage()


@pytest.mark.parametrize("marker", ["model_0000003.pth", "nothing.pth", ""])
def test_a_marker_that_names_nothing_usable(whole, marker, tmp_path):
    cfg, run = whole
    part = resumed_copy(run, tmp_path / "part", "model_0000003.pth")
    if marker == "model_0000003.pth":
        flip(part / marker)
    else:
        (part / "model_0000003.pth").unlink()
    (part / "last_checkpoint").write_text(marker)
    with pytest.raises(ValueError, match="has no whole checkpoint to resume from") as refused:
        train(cfg, part, resume=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("harm", [cut, flip, "unlink", None])
def test_a_last_file_that_is_not_whole_is_not_the_end(whole, harm, tmp_path):
    """Killed inside model_final.pth, when the last iteration has a file of its own."""
    cfg, run = whole
    part = resumed_copy(run, tmp_path / "part", "model_0000005.pth")
    if harm != "unlink":
        shutil.copy(run / "model_final.pth", part)
    if callable(harm):
        harm(part / "model_final.pth")
    before = (part / "model_final.pth").stat().st_mtime_ns if harm is None else None
    train(cfg, part, resume=True)
    assert same_end(run, part) == []
    assert harm is not None or (part / "model_final.pth").stat().st_mtime_ns == before


def test_without_a_marker_the_last_whole_one_is_taken(whole, tmp_path):
    cfg, run = whole
    part = resumed_copy(run, tmp_path / "part", "model_0000003.pth")
    (part / "last_checkpoint").unlink()
    assert train(cfg, part, resume=True).start_iter == 4


def test_the_last_ones_are_kept(whole, tmp_path):
    cfg = whole[0].clone()
    cfg.HKD.SOLVER.KEEP_CHECKPOINTS = 2
    train(cfg, tmp_path / "run")
    kept = sorted(p.name for p in (tmp_path / "run").glob("*.pth"))
    assert kept == ["model_0000003.pth", "model_0000005.pth", "model_final.pth"]


@rule("No checkpoint holds a value that is not finite")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_checkpoint_holds_a_nan(value, tmp_path):
    model = nn.Linear(3, 3)
    checkpointer = StudentCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    with torch.no_grad():
        model.weight[1, 2] = value
    with pytest.raises(ValueError, match="'model.weight' is not finite"):
        checkpointer.save("model_0000002")
    assert {p.name for p in tmp_path.iterdir()} == {"model_0000001.pth", "last_checkpoint"}


def test_no_run_goes_on_from_a_nan(tmp_path, caplog):
    model = nn.Linear(3, 3)
    checkpointer = StudentCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    bad = tmp_path / "model_0000002.pth"
    torch.save({"model": {"weight": torch.full((3, 3), torch.nan), "bias": torch.ones(3)}}, bad)
    (tmp_path / "last_checkpoint").write_text(bad.name)
    checkpointer.resume_or_load("", resume=True)
    assert "'model.weight' in" in caplog.text and "model_0000002.pth' is not finite" in caplog.text
    (tmp_path / "model_0000001.pth").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint.*'model.weight' in .* not finite"):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize("losses", ["loss_cls nan", "Predicted boxes or scores contain"])
def test_a_run_that_diverges(losses, tmp_path):
    one_stage = losses.startswith("loss")
    cfg = one_stage_config("IgnoreAwareRetinaNet") if one_stage else small_config()
    cfg = with_pictures(cfg, tmp_path)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 9, 1e30, 0
    with pytest.raises(ValueError, match=rf"not finite at iteration \d+ \(.*{losses}.*BASE_LR"):
        train(cfg, tmp_path / "run")


PROCESS, STEP = ("processes", 0), ("trainer", "_trainer")


@pytest.mark.parametrize(
    ("keys", "value", "owner"),
    [
        (("processes",), [], "processes"),
        (PROCESS, "text", "processes"),
        ((*PROCESS, "random", "python"), None, "processes"),
        ((*PROCESS, "random", "numpy"), ([1] * 624, 10**6, 0, 0.0), "processes"),
        ((*PROCESS, "random", "torch"), b"x", "processes"),
        ((*PROCESS, "running_means"), {"": None}, "processes"),
        ((*PROCESS, "loader", "form", "images"), "4", "processes"),
        ((*PROCESS, "loader", "done"), [-1], "processes"),
        ((*PROCESS, "loader", "states"), [3], "processes"),
        ((*PROCESS, "loader", "waiting"), [[3], []], "processes"),
        ((*PROCESS, "loader", "waiting"), [[[0, 10**9, None]], []], "processes"),
        ((*PROCESS, "loader", "sampler", "_seed"), 10**30, "processes"),
        (("trainer", "iteration"), 2.5, "trainer"),
        (("trainer", "hooks"), [], "trainer"),
        (("trainer", "hooks", "LRScheduler", "last_epoch"), "x", "trainer"),
        ((*STEP, "optimizer", "param_groups", 0, "lr"), float("nan"), "trainer"),
        ((*STEP, "optimizer", "state", 0, "momentum_buffer"), torch.ones(2, 2), "trainer"),
        ((*STEP, "optimizer", "state", 0), {}, "trainer"),
        (("trainer", "_trainer"), {"optimizer": 3}, None),
    ],
)
def test_a_damaged_state_is_one_sentence(whole, keys, value, owner, tmp_path):
    cfg, run = whole
    part = resumed_copy(run, tmp_path / "part", "model_0000003.pth")
    content = node = read_checkpoint(part / "model_0000003.pth")
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    torch.save(content, part / "model_0000003.pth")
    sentence = f"a damaged state of the {owner} " if owner else "no state of an optimizer"
    with pytest.raises(ValueError, match=f"model_0000003.pth' has {sentence}") as refused:
        train(cfg, part, resume=True)
    assert "\n" not in str(refused.value)


class FullDisk(checkpoint._HashedFile):
    """Takes 100 kB."""

    def __init__(self, file):
        super().__init__(file)
        self.room = 100_000

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return super().write(content)


def test_a_full_disk(tmp_path, monkeypatch):
    checkpointer = StudentCheckpointer(nn.Linear(300, 300), str(tmp_path))
    checkpointer.save("model_0000001")

    monkeypatch.setattr(checkpoint, "_HashedFile", FullDisk)
    with pytest.raises(OSError, match="There is no room for '.*model_0000002.pth'"):
        checkpointer.save("model_0000002")
    assert {p.name for p in tmp_path.iterdir()} == {"model_0000001.pth", "last_checkpoint"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_a_disk_that_is_full_in_a_run(whole, tmp_path, monkeypatch):
    """One sentence; with room again the run ends as it would have ended."""
    cfg, run = whole
    part = resumed_copy(run, tmp_path / "part", "model_0000001.pth")
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger("detectron2.engine.train_loop").addHandler(handler)
    monkeypatch.setattr(checkpoint, "_HashedFile", FullDisk)
    with pytest.raises(OSError, match="There is no room for '.*model_0000003.pth'"):
        train(cfg, part, resume=True)
    logging.getLogger("detectron2.engine.train_loop").removeHandler(handler)
    assert not any(record.exc_info for record in logged)
    assert sorted(p.name for p in part.glob("*.pth")) == ["model_0000001.pth"]
    monkeypatch.undo()
    train(cfg, part, resume=True)
    assert same_end(run, part) == []


def test_a_disk_that_keeps_something_else(tmp_path, monkeypatch):
    write = checkpoint._write

    def faulty(content, path):
        digest = write(content, path)
        flip(path)
        return digest

    monkeypatch.setattr(checkpoint, "_write", faulty)
    checkpointer = StudentCheckpointer(nn.Linear(300, 300), str(tmp_path))
    with pytest.raises(OSError, match="not on the disk as it was written"):
        checkpointer.save("model_0000002")
    assert list(tmp_path.iterdir()) == []


def test_what_a_checkpoint_has_beside_detectron2s(whole):
    content = read_checkpoint(whole[1] / "model_final.pth")
    (state,) = content["processes"]
    assert set(state) == {"random", "loader", "running_means"}
    assert sum(state["loader"]["done"]) >= 12
