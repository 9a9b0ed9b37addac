"""What ran, in pytest's header; fixtures over the detectors of small_detectors.py.

Detectron2 is imported inside fixtures, so that tests/ops runs with PyTorch alone.
"""

import copy
import os

# Tiny networks: threads would only wait for each other, in subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def no_users_cache(tmp_path_factory):
    """Data sets are parsed into a folder of this session, not into the user's cache."""
    os.environ["HKD_D2_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run: a loss with kinks has inputs that no test may meet."""
    torch.manual_seed(0)


def pytest_report_header():
    """Name the implementation that a test runs where it does not choose one."""
    from hkd_d2.ops import build_info

    info = build_info()
    lines = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        runs = {"fused": [], "reference": []}
        for operator, devices in info["operators"].items():
            runs[devices[device]].append(operator)
        runs = "; ".join(f"{impl}: {', '.join(names) or 'none'}" for impl, names in runs.items())
        lines.append(f"hkd_d2.ops on {device}: {runs}")
    native = "hkd_d2._native is not built"
    if info["modules"]["_native"]:
        native = f"{info['cpu_isa']}, {info['compiler']} {info['flags']}"
    return [*lines, f"hkd_d2 kernels: {native}"]


@pytest.fixture(scope="session")
def teacher_files(tmp_path_factory):
    """Config file and weights of a teacher that is wider than the student."""
    from helpers.small_detectors import save_teacher, small_config

    cfg = small_config(channels=32, hidden=40, width=0.5)
    return save_teacher(cfg, tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def student_cfg():
    from helpers.small_detectors import small_config

    return small_config()


@pytest.fixture
def hkd_cfg(teacher_files):
    """The student's config with the three terms of HKD, every part, beside the teacher."""
    from helpers.small_detectors import small_config
    from hkd_d2.distillation.logit_box_head import BoxHeadParts
    from hkd_d2.distillation.logit_dense_head import RPNParts

    cfg = small_config()
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = teacher_files
    cfg.HKD.TERMS = ["pyramid", "region", "logit"]
    cfg.HKD.LOGIT.PARTS = [*BoxHeadParts.PARTS, *RPNParts.PARTS]
    return cfg


@pytest.fixture
def build():
    """Build a model under a fixed seed, in training mode."""
    from detectron2.modeling import build_model

    def build_seeded(cfg, seed=0):
        torch.manual_seed(seed)
        return build_model(copy.deepcopy(cfg)).train()

    return build_seeded
