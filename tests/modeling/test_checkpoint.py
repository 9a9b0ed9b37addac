"""Checkpoints are read by one function: what is whole loads, anything else is one sentence."""

import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from hkd_d2.export.weights import save_safetensors
from hkd_d2.modeling.checkpoint import StudentCheckpointer, read_checkpoint, weights_sha256


class Code:
    def __reduce__(self):
        return print, ("code ran",)


def dump(content, path):
    path.write_bytes(pickle.dumps(content))


def make_bad(kind, path):
    """A file that is no checkpoint, or a folder."""
    weights = {"weight": torch.ones(200, 200)}
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("Not Found")
    elif kind == "code":
        content = {"model": {}, "x": Code()}
        dump(content, path) if path.suffix == ".pkl" else torch.save(content, path)
    elif kind == "list":
        dump([1, 2], path) if path.suffix == ".pkl" else torch.save([torch.ones(2)], path)
    elif kind == "number":
        content = {"model": {"weight": 3.0}, "__author__": "x"}
        dump(content, path) if path.suffix == ".pkl" else torch.save(content, path)
    elif kind == "cut":
        torch.save({"model": weights}, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "flipped":
        torch.save({"model": weights}, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth", ".safetensors", ".bin"])
@pytest.mark.parametrize("kind", ["folder", "empty", "text", "code", "list", "number"])
def test_what_is_no_checkpoint(kind, suffix, tmp_path, capsys):
    path = tmp_path / f"x{suffix}"
    make_bad(kind, path)
    for read in (read_checkpoint, StudentCheckpointer(nn.Linear(2, 2)).load):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint") as refused:
            read(str(path))
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cut", "flipped"])
def test_damage_is_seen(kind, tmp_path):
    make_bad(kind, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "x.pth")


def test_a_flipped_bit_in_safetensors(tmp_path):
    model, path = nn.Linear(200, 200), tmp_path / "x.safetensors"
    save_safetensors(model, {"weights_sha256": weights_sha256(model)}, path)
    assert torch.equal(read_checkpoint(path)["model"]["weight"], model.weight)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not those that it was written with"):
        read_checkpoint(path)
    # Somebody else's file says nothing of its weights.
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    assert read_checkpoint(path)["model"]["weight"].tolist() == [1, 1]


def test_a_caffe2_pickle(tmp_path):
    blobs = {"conv1_w": np.ones((2, 3), np.float32), "conv1_w_momentum": np.ones(1)}
    dump({"blobs": blobs}, tmp_path / "x.pkl")
    content = read_checkpoint(tmp_path / "x.pkl")
    assert list(content["model"]) == ["conv1_w"] and content["__author__"] == "Caffe2"


class Trainer(nn.Module):
    """What a checkpoint of a run has beside the model."""

    def __init__(self, model, optimizer=torch.optim.SGD):
        super().__init__()
        self._trainer = self
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def state_dict(self):
        return {"_trainer": {"optimizer": self.optimizer.state_dict()}}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["_trainer"]["optimizer"])


class Run(nn.Module):
    def __init__(self, width=4, terms=("pyramid",)):
        super().__init__()
        self.student = nn.Linear(4, width)
        self.terms = nn.ModuleDict({name: nn.Linear(2, 2) for name in terms})

    def checkpointer(self, folder, **options):
        return StudentCheckpointer(self, str(folder), trainer=Trainer(self, **options))


def test_a_run_goes_on_from_its_own_checkpoint_alone(tmp_path):
    Run().checkpointer(tmp_path).save("model_0000009")
    Run().checkpointer(tmp_path).resume_or_load("", resume=True)
    for run, options, sentence in [
        (Run(width=5), {}, "another architecture: 'bias' has shape .4,. in the file and .5,."),
        (Run(terms=["region"]), {}, "the states of pyramid and HKD.TERMS is .'region'."),
        (Run(terms=["pyramid", "region"]), {}, "other distillation terms"),
        (Run(), {"optimizer": torch.optim.Adam}, "set HKD.SOLVER.OPTIMIZER"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            run.checkpointer(tmp_path, **options).resume_or_load("", resume=True)
    frozen = Run()
    frozen.student.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="other trainable parameters"):
        frozen.checkpointer(tmp_path).resume_or_load("", resume=True)


def test_weights_alone_cannot_be_resumed(tmp_path):
    StudentCheckpointer(Run(), str(tmp_path)).save("model")
    with pytest.raises(ValueError, match="has weights alone"):
        Run().checkpointer(tmp_path).resume_or_load("", resume=True)
    torch.save({**read_checkpoint(tmp_path / "model.pth"), "trainer": 3}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="no state of an optimizer"):
        Run().checkpointer(tmp_path).resume_or_load("", resume=True)


@pytest.mark.parametrize("marker", [b"\xff\xac", b"", b"nothing.pth", b"a\0b", b"../x\n"])
def test_a_damaged_marker_of_the_last_checkpoint(tmp_path, marker):
    """The others are looked for in its place."""
    Run().checkpointer(tmp_path).save("model_0000009")
    (tmp_path / "last_checkpoint").write_bytes(marker)
    checkpointer = Run().checkpointer(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    assert checkpointer.resumed


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_a_tensor_that_no_detector_has(kind, tmp_path):
    path = tmp_path / "model.pth"
    value = torch.eye(3).to_sparse() if kind == "sparse" else torch.ones(3, dtype=torch.complex64)
    torch.save({"model": {"weight": value}}, path)
    with pytest.raises(ValueError, match="model.pth' .*'weight' in it is no tensor of real"):
        read_checkpoint(path)
