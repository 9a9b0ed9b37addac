"""Two processes on the CPU agree with one process on the doubled batch."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from helpers.rules import rule
from helpers.small_detectors import make_batch
from helpers.two_processes import run_in_two_processes
from hkd_d2.modeling.checkpoint import StudentCheckpointer

STEPS = 3


def deterministic_sampling(cfg):
    """Every anchor and the same number of boxes an image, so that nothing hangs on a draw."""
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 100000
    cfg.MODEL.RPN.POSITIVE_FRACTION = 1.0
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 40
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 10
    cfg.MODEL.RPN.NMS_THRESH = 0.99
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 1000
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    cfg.HKD.LOGIT.PARTS = ["hidden", "predictions", "kl"]
    for name, weight in (("PYRAMID", 0.5), ("REGION", 0.5), ("LOGIT", 0.1)):
        cfg.HKD[name].WEIGHT = weight
    return cfg


def train(model, parameters, batches):
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    with EventStorage(0) as storage:
        for batch in batches:
            losses = model(copy.deepcopy(batch))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            storage.step()


def one_rank(rank, cfg, batches, path):
    import hkd_d2.config  # noqa: F401  (registrations)

    torch.manual_seed(rank)  # DDP has to make the students alike, not the seed
    detector = build_model(cfg).train()
    if rank == 0:
        torch.save([p.detach().clone() for p in detector.parameters()], path + ".start")
    teacher = copy.deepcopy(detector.teacher.model.state_dict())
    model = DistributedDataParallel(detector, broadcast_buffers=False)
    own = [[batch[rank]] for batch in batches]
    train(model, model.parameters(), own)
    for name, value in detector.teacher.model.state_dict().items():
        assert torch.equal(value, teacher[name]), name
    assert not any("teacher." in name for name, _ in model.named_parameters())
    torch.save([p.detach() for p in detector.parameters()], f"{path}.{rank}")


@rule("Two processes equal one on the doubled batch")
@pytest.mark.parametrize(
    "terms, mutual",
    [(["pyramid", "region", "logit"], False), (["hsakd"], False), (["hsakd"], True)],
    ids=["hkd", "hsakd", "hssakd"],
)
def test_two_processes_equal_one_on_the_doubled_batch(hkd_cfg, tmp_path, terms, mutual):
    cfg = deterministic_sampling(hkd_cfg)
    cfg.HKD.TERMS = terms
    cfg.HKD.HSAKD.update(TEACHER_ITERS=1, MUTUAL=mutual)  # of three steps
    batches = [make_batch(sizes=((64, 96), (64, 96)), seed=s) for s in range(STEPS)]
    path = str(tmp_path / "parameters")
    run_in_two_processes(one_rank, cfg, batches, path)

    detector = build_model(cfg).train()
    start = torch.load(path + ".start", weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(detector.parameters(), start, strict=True):
            parameter.copy_(value)
    train(detector, detector.parameters(), batches)
    ranks = [torch.load(f"{path}.{r}", weights_only=True) for r in range(2)]
    for (name, parameter), first, second, begin in zip(
        detector.named_parameters(), *ranks, start, strict=True
    ):
        assert torch.equal(first, second), name
        assert torch.allclose(parameter, first, rtol=1e-3, atol=2e-6), name
        moved = (parameter - begin).abs().max()
        assert moved == 0 or (parameter - first).abs().max() < 0.02 * moved, name


def rank_with_terms(rank, cfg, path):
    import hkd_d2.config  # noqa: F401  (registrations)

    detector = build_model(cfg).train()
    model = DistributedDataParallel(detector, broadcast_buffers=False)
    batches = [make_batch(sizes=((64, 96), (64, 96)), seed=s) for s in range(2)]
    own = [[batch[rank]] for batch in batches]
    own[rank][0]["instances"] = own[rank][0]["instances"][:0]  # each once without an object
    # A parameter that got no gradient would leave the other process waiting, and stop the second
    # forward.
    train(model, model.parameters(), own)
    torch.save([p.detach() for p in detector.parameters()], f"{path}.{rank}")


def test_processes_with_feature_terms_stay_alike(hkd_cfg, tmp_path):
    cfg = hkd_cfg
    cfg.HKD.TERMS = ["pyramid", "fgd", "mgd", "reviewkd"]
    cfg.HKD.PYRAMID.MASK, cfg.HKD.PYRAMID.RASTERIZE = "boxes", "fgfi"
    cfg.HKD.PYRAMID.ADAPTER = "conv3x3_relu"
    path = str(tmp_path / "parameters")
    run_in_two_processes(rank_with_terms, cfg, path)
    ranks = [torch.load(f"{path}.{r}", weights_only=True) for r in range(2)]
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(*ranks, strict=True))


def rank_that_logs(rank, cfg, path):
    import hkd_d2.config  # noqa: F401  (registrations)

    detector = build_model(cfg).train()
    batch = make_batch(sizes=((64, 96), (64, 96)), seed=0)
    with EventStorage(0) as storage:
        losses = detector([batch[rank]])
        logged = {k: v for k, (v, _) in storage.latest().items() if k.endswith("_raw")}
    torch.save(({k: v.item() for k, v in losses.items()}, logged), f"{path}.{rank}")


def test_raw_losses_are_means_over_processes(hkd_cfg, tmp_path):
    path = str(tmp_path / "losses")
    run_in_two_processes(rank_that_logs, hkd_cfg, path)
    (first, logged), (second, _) = (torch.load(f"{path}.{r}", weights_only=True) for r in range(2))
    for name in ("pyramid", "region", "logit"):
        own, other = first[f"loss_hkd_{name}"], second[f"loss_hkd_{name}"]
        weight = hkd_cfg.HKD[name.upper()].WEIGHT
        assert abs(own - other) > 1e-4 * abs(own)
        assert logged[f"hkd/{name}_raw"] * weight == pytest.approx((own + other) / 2, rel=1e-5)


def rank_with_a_folder_of_its_own(rank, folder):
    model = torch.nn.Linear(3, 3)
    checkpointer = StudentCheckpointer(model, f"{folder}/{rank}")
    checkpointer.resume_or_load("", resume=True)
    assert checkpointer.resumed
    torch.save(model.state_dict(), f"{folder}/{rank}.pth")


def test_machines_with_folders_of_their_own_resume_alike(tmp_path):
    """The folder of the main process has the checkpoint; the other one is empty."""
    (tmp_path / "1").mkdir()
    (tmp_path / "0").mkdir()
    StudentCheckpointer(torch.nn.Linear(3, 3), str(tmp_path / "0")).save("model_0000009")
    run_in_two_processes(rank_with_a_folder_of_its_own, str(tmp_path))
    states = [torch.load(tmp_path / f"{r}.pth", weights_only=True) for r in range(2)]
    wanted = torch.load(tmp_path / "0" / "model_0000009.pth", weights_only=True)["model"]
    for state in states:
        assert all(torch.equal(state[k], v) for k, v in wanted.items())
