"""Fixtures over the detectors of small_detectors.py."""

import copy
import os

# Tiny networks: threads would only wait for each other, in subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from detectron2.modeling import build_model
from small_detectors import save_teacher, small_config


@pytest.fixture(scope="session")
def teacher_files(tmp_path_factory):
    """Config file and weights of a teacher that is wider than the student."""
    cfg = small_config(channels=32, hidden=40, width=0.5)
    return save_teacher(cfg, tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def student_cfg():
    return small_config()


@pytest.fixture
def hkd_cfg(teacher_files):
    """The student's config with the three terms of HKD beside the teacher."""
    cfg = small_config()
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = teacher_files
    cfg.HKD.TERMS = ["pyramid", "region", "logit"]
    cfg.HKD.LOGIT.PARTS = ["hidden", "predictions", "kl", "deltas", "bounded"]
    return cfg


@pytest.fixture
def build():
    """Build a model under a fixed seed, in training mode."""

    def build_seeded(cfg, seed=0):
        torch.manual_seed(seed)
        return build_model(copy.deepcopy(cfg)).train()

    return build_seeded
