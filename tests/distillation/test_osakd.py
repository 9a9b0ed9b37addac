"""OSAKD: votes by brute force, the bank, the loss by hand, steps beside plain Detectron2."""

import copy
import math

import pytest
import torch

from helpers.small_detectors import make_batch
from helpers.small_maps import NOTHING, build_term, passed_regions, spec
from helpers.training_steps import plain_in_channels_last, steps
from hkd_d2.modeling.checkpoint import StudentCheckpointer


def osakd(student=None, **options):
    options = {"K": 3, "BANK_SIZE": 12, "READY_AT": 4, **options}
    return build_term("osakd", student or spec(hidden_channels=1), None, **options)


@pytest.mark.parametrize("rows", [7, 300])
def test_votes_by_brute_force(rows):
    torch.manual_seed(3)
    term = osakd(spec(hidden_channels=5, num_classes=2), K=4, BANK_SIZE=120)
    bank, classes = torch.randn(rows, 5), torch.randint(0, 3, (rows,))
    for i in range(0, rows, 10):
        term.remember(bank[i : i + 10], classes[i : i + 10])
    kept = [  # the last 40 of each class
        i for i in range(rows) if (classes[i:] == classes[i]).sum() <= 40
    ]
    queries = torch.randn(6, 5)
    for query, found in zip(queries, term.posterior(queries), strict=True):
        near = sorted(kept, key=lambda i: float((bank[i].double() - query.double()).norm()))[:4]
        votes = [sum(int(classes[i]) == m for i in near) for m in range(3)]
        expected = [(v + 0.1) / (4 + 3 * 0.1) for v in votes]
        assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_loss_by_hand(loss):
    term = osakd(LOSS=loss, SMOOTHING=0.5)
    term.remember(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([0, 1, 0, 1]))
    hidden = torch.tensor([[0.5]], requires_grad=True)
    logits = torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    found = term(passed_regions(logits, [0], hidden), None, NOTHING)
    # Neighbours of 0.5: 0 and 2 of class 0, 1 of class 1, so s = (2.5, 1.5) / 4; p = (3, 1) / 4.
    if loss == "kl":
        expected = 0.625 * math.log(0.625 / 0.75) + 0.375 * math.log(0.375 / 0.25)
        gradient = [0.75 - 0.625, 0.25 - 0.375]
    else:
        expected = (0.125**2 + 0.125**2) / 2
        gradient = [0.125 * 2 * 0.75 * 0.25, -0.125 * 2 * 0.75 * 0.25]
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert logits.grad[0].tolist() == pytest.approx(gradient, rel=1e-5)
    assert hidden.grad is None  # embeddings are labels here


def test_a_region_does_not_vote_for_itself_and_silence_until_the_bank_is_ready():
    term = osakd(K=1, READY_AT=2)
    hidden, logits = torch.tensor([[1.0], [5.0]]), torch.zeros(2, 2, requires_grad=True)
    first = term(passed_regions(logits, [0, 1], hidden), None, NOTHING)
    assert first.item() == 0
    first.backward()
    assert not logits.grad.any()
    # Region 5 was of class 1 a step ago and says that it is of class 0 now.
    second = term(passed_regions(logits[1:], [0], hidden[1:]), None, NOTHING)
    s = [0.1 / 1.2, 1.1 / 1.2]
    assert second.item() == pytest.approx(sum(p * math.log(2 * p) for p in s), rel=1e-5)


def test_the_bank_keeps_the_last_of_each_class():
    term = osakd()  # six rows a class
    none = torch.tensor([-1])
    for first in range(0, 20, 5):
        rows = torch.arange(first, first + 5.0)[:, None]
        term.remember(torch.cat([rows, rows[:1]]), torch.cat([torch.tensor([1] * 5), none]))
    assert sorted(term.embeddings[6:12, 0].tolist()) == [14, 15, 16, 17, 18, 19]
    assert term.classes.tolist() == [-1] * 6 + [1] * 6
    # More of a class at once than there is room for.
    term.remember(torch.arange(100, 110.0)[:, None], torch.zeros(10, dtype=torch.int64))
    assert sorted(term.embeddings[:6, 0].tolist()) == [104, 105, 106, 107, 108, 109]
    term.remember(torch.tensor([[7.0]]), torch.tensor([0]))
    assert sorted(term.embeddings[:6, 0].tolist()) == [7, 105, 106, 107, 108, 109]


def test_no_regions():
    term = osakd()
    logits = torch.zeros(0, 2, requires_grad=True)
    found = term(passed_regions(logits, [], torch.zeros(0, 1)), None, NOTHING)
    assert found.item() == 0 and found.requires_grad


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"LOSS": "l1"}, "HKD.OSAKD.LOSS is 'l1'"),
        ({"K": 5}, "0 < K <= READY_AT <= 12"),
        ({"READY_AT": 13}, "0 < K <= READY_AT <= 12"),
        ({"BANK_SIZE": 1}, "a larger BANK_SIZE"),
        ({"SMOOTHING": 0.0}, "give a number above 0"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        osakd(**options)


def test_a_one_stage_student_is_refused():
    with pytest.raises(ValueError, match="one-stage; drop 'osakd'"):
        osakd(spec(one_stage=True))


@pytest.fixture
def alone(student_cfg):
    cfg = copy.deepcopy(student_cfg)
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TERMS = ["osakd"]
    cfg.HKD.OSAKD.update(K=5, BANK_SIZE=256, READY_AT=32, WEIGHT=0.0)
    cfg.HKD.POOLER = "torchvision"
    return cfg


def test_weight_zero_equals_plain_detectron2_bit_for_bit(student_cfg, alone, build):
    batches = [make_batch(seed=s) for s in range(3)]
    plain = build(student_cfg)
    plain_in_channels_last(plain)
    distilled = build(alone)
    assert distilled.teacher is None
    expected, _ = steps(plain, batches)
    found, storage = steps(distilled, batches)
    for (losses, grads, state), (losses0, grads0, state0) in zip(found, expected, strict=True):
        assert all(torch.equal(losses[n], x) for n, x in losses0.items())
        assert all(torch.equal(grads[n], x) for n, x in grads0.items())
        assert torch.equal(state, state0)
    assert list(distilled.state_dict()) == list(plain.state_dict())
    assert distilled.terms["osakd"].written.sum() > 32


def test_the_bank_is_saved_with_the_training_state(alone, build, tmp_path):
    model = build(alone)
    steps(model, [make_batch()] * 2)
    StudentCheckpointer(model, str(tmp_path)).save("model")
    file = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(file["model"]) == list(model.student.state_dict())
    again = build(alone, seed=1)
    StudentCheckpointer(again, str(tmp_path)).load(str(tmp_path / "model.pth"))
    bank, bank0 = again.terms["osakd"].state_dict(), model.terms["osakd"].state_dict()
    assert set(bank) == {"embeddings", "classes", "written"}
    assert all(torch.equal(bank[k], bank0[k]) for k in bank0)


def test_beside_a_teacher(hkd_cfg, build):
    hkd_cfg.HKD.TERMS = ["pyramid", "region", "logit", "osakd"]
    hkd_cfg.HKD.OSAKD.update(K=5, BANK_SIZE=256, READY_AT=32)
    record, _ = steps(build(hkd_cfg), [make_batch(seed=s) for s in range(3)])
    assert record[-1][0]["loss_hkd_osakd"] > 0
    assert all(x.isfinite() for x in record[-1][0].values())
