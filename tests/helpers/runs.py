"""Short training runs on noise pictures, and a comparison of what two of them left."""

import copy
import shutil
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng

from hkd_d2.engine import Trainer
from hkd_d2.modeling.checkpoint import read_checkpoint


def train(cfg: CfgNode, folder: Path, resume: bool = False) -> Trainer:
    """Train as the command line does in one process; returns the trainer."""
    cfg = copy.deepcopy(cfg)
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def resumed_copy(whole: Path, part: Path, name: str) -> Path:
    """A copy of a run's folder that was stopped when the checkpoint ``name`` was the last."""
    part.mkdir()
    shutil.copy(whole / name, part)
    (part / "last_checkpoint").write_text(name)
    return part


def differences(first: object, second: object, path: str = "") -> list[str]:
    """Where two checkpoints differ by a bit; [] where they do not."""
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return [f"{path}: keys"]
        return [d for k in first for d in differences(first[k], second[k], f"{path}.{k}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return [f"{path}: length"]
        pairs = enumerate(zip(first, second, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}.{i}")]
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [path]
    return [] if first == second else [path]


def same_end(first: Path, second: Path) -> list[str]:
    """Where the last checkpoints of two runs differ, their random states included."""
    return differences(*(read_checkpoint(f / "model_final.pth") for f in (first, second)))
