"""docs/adding_a_term.md, executed: its term in a file outside the package, and its config."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from helpers.rules import rule
from helpers.small_detectors import make_batch, save_teacher, small_config
from helpers.training_steps import steps
from hkd_d2.config import load_config
from hkd_d2.data.streets import generate_streets
from hkd_d2.distillation.term import TERM_REGISTRY

pytestmark = rule("The documents' example of a new term trains")

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "adding_a_term.md"


@pytest.fixture
def blocks():
    """The document's code by language, in its order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    return {kind: [code for k, code in found if k == kind] for kind, _ in found}


@pytest.fixture
def package(blocks, tmp_path, monkeypatch):
    """The document's term in a package that Python finds; its name, in no other file of ours."""
    folder = tmp_path / "elsewhere" / "my_team"
    folder.mkdir(parents=True)
    (folder / "contrast.py").write_text(blocks["python"][0])
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("PYTHONPATH", f"{folder.parent}{os.pathsep}{ROOT}")
    importlib.invalidate_caches()
    yield folder
    TERM_REGISTRY._obj_map.pop("Contrast", None)
    for name in ("my_team.contrast", "my_team"):
        sys.modules.pop(name, None)


@pytest.fixture
def config_file(blocks, package, tmp_path):
    """The document's config, on a small student beside a small teacher."""
    config, weights = save_teacher(small_config(channels=24, width=0.5), tmp_path)
    student = small_config()
    student.MODEL.META_ARCHITECTURE = "HKDDetector"
    student.HKD.TEACHER.CONFIG_FILE, student.HKD.TEACHER.WEIGHTS = config, weights
    (tmp_path / "student.yaml").write_text(student.dump())
    (tmp_path / "contrast.yaml").write_text("_BASE_: student.yaml\n" + blocks["yaml"][0])
    return str(tmp_path / "contrast.yaml")


def test_the_example_trains(config_file):
    cfg = load_config(config_file)
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


def test_the_example_refuses_a_level_that_is_not_there(config_file):
    cfg = load_config(config_file)
    cfg.HKD.CONTRAST.LEVEL = "p9"
    with pytest.raises(ValueError, match="'p9', which the student does not have; choose from p2"):
        build_model(cfg)


@rule("A term is one file, outside the package and inside")
def test_a_term_is_one_file(config_file, package):
    """Outside the package and, as the same file in its folder, inside."""
    assert [path.name for path in package.rglob("*") if path.is_file()] == ["contrast.py"]
    load_config(config_file)
    assert sys.modules["my_team.contrast"].__file__ == str(package / "contrast.py")
    # Inside, nothing lists the modules of the folder, so a new one needs no line elsewhere.
    for listing in ("__init__.py", "term.py"):
        text = (ROOT / "hkd_d2" / "distillation" / listing).read_text()
        assert "mgd" not in text.lower()
    assert "mgd" not in (ROOT / "hkd_d2" / "configuration" / "keys.py").read_text().lower()


def test_the_train_command_finds_the_term(config_file, tmp_path):
    """Two iterations on drawn streets, in a process that starts with nothing imported."""
    generate_streets(tmp_path / "streets", num_train=2, num_val=2, height=64, width=96, workers=1)
    out = tmp_path / "run"
    sets = [[f"train_{tmp_path.name}", "citypersons", str(tmp_path / "streets"), "train"]]
    options = {
        "HKD.DATA.REGISTER": sets,
        "DATASETS.TRAIN": (sets[0][0],),
        "DATASETS.TEST": (),
        "HKD.DATA.MIN_HEIGHT": 1,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.IMS_PER_BATCH": 1,
        "MODEL.PROPOSAL_GENERATOR.NAME": "IgnoreAwareRPN",
        "MODEL.ROI_HEADS.NAME": "IgnoreAwareROIHeads",
        "OUTPUT_DIR": out,
        "HKD.CONTRAST.SCHEDULE.WARMUP_ITERS": 0,
    }
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, ROOT / "tools" / "train_net.py", "--config-file", config_file]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "loss_hkd_contrast" in (out / "metrics.json").read_text()
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 1
