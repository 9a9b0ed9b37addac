"""docs/adding_a_term.md, executed: its term in a file outside the package, and its config."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from helpers.rules import rule
from helpers.small_detectors import make_batch, save_teacher, small_config
from helpers.training_steps import steps
from hkd_d2.distillation.term import TERM_REGISTRY

pytestmark = rule("The documents' example of a new term trains")

DOCUMENT = Path(__file__).parents[1] / "docs" / "adding_a_term.md"


@pytest.fixture
def blocks():
    """The document's code by language, in its order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    return {kind: [code for k, code in found if k == kind] for kind, _ in found}


@pytest.fixture
def read_config(blocks, tmp_path, monkeypatch):
    """The document's function, with its term in a module beside the working directory."""
    term, reader = blocks["python"]
    (tmp_path / "contrast.py").write_text(term)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    namespace = {}
    exec(compile(reader, str(DOCUMENT), "exec"), namespace)
    yield namespace["read_config"]
    TERM_REGISTRY._obj_map.pop("Contrast")
    sys.modules.pop("contrast")


@pytest.fixture
def config_file(blocks, tmp_path):
    """The document's config, on a small student beside a small teacher."""
    config, weights = save_teacher(small_config(channels=24, width=0.5), tmp_path)
    student = small_config()
    student.MODEL.META_ARCHITECTURE = "HKDDetector"
    student.HKD.TEACHER.CONFIG_FILE, student.HKD.TEACHER.WEIGHTS = config, weights
    (tmp_path / "student.yaml").write_text(student.dump())
    (tmp_path / "contrast.yaml").write_text("_BASE_: student.yaml\n" + blocks["yaml"][0])
    return str(tmp_path / "contrast.yaml")


def test_the_example_trains(read_config, config_file):
    cfg = read_config(config_file)
    assert list(cfg.HKD.TERMS) == ["contrast"] and cfg.HKD.CONTRAST.LEVEL == "p4"
    model = build_model(cfg).train()
    raw, slopes = [], []

    def watch(_, passes, loss):
        raw.append(loss.item())
        (slope,) = torch.autograd.grad(loss, passes[0].features["p4"], retain_graph=True)
        slopes.append(slope.norm().item())

    model.terms["contrast"].register_forward_hook(watch)
    record, _ = steps(model, [make_batch()] * 50)
    weighted = [losses["loss_hkd_contrast"].item() for losses, _, _ in record]
    # WEIGHT 2, reached by a fifth of it an iteration.
    rising = [w * x for w, x in zip([0.4, 0.8, 1.2, 1.6, 2, 2], raw[:6], strict=True)]
    assert weighted[:6] == pytest.approx(rising)
    assert min(slopes) > 0
    assert 0 < raw[-1] < raw[0] / 2


def test_the_example_refuses_a_level_that_is_not_there(read_config, config_file):
    cfg = read_config(config_file)
    cfg.HKD.CONTRAST.LEVEL = "p9"
    with pytest.raises(ValueError, match="'p9', which the student does not have; choose from p2"):
        build_model(cfg)
