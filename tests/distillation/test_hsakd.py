"""HSAKD: exact turns, the loss by a composition of its own, two phases, no trace at weight 0."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torchvision.ops import roi_align

from helpers.rules import rule
from helpers.small_detectors import make_batch
from helpers.small_maps import NOTHING, build_term, spec
from helpers.training_steps import plain_in_channels_last, steps
from hkd_d2.distillation.detector_pass import DetectorPass
from hkd_d2.distillation.rotation import turn_boxes, turn_images
from hkd_d2.engine.preflight import check_optimizer, check_terms
from hkd_d2.engine.solver import build_optimizer
from hkd_d2.modeling.checkpoint import StudentCheckpointer


@rule("Boxes turn with the pixels, exactly")
@pytest.mark.parametrize("turns", range(5))
def test_boxes_turn_with_the_pixels(turns):
    """The box of the painted pixels, found in the turned image."""
    height, width = 12, 20
    boxes = torch.tensor([[3.0, 2, 9, 11], [0, 0, 1, 1], [12, 5, 20, 12]])
    turned = turn_boxes(boxes, turns, (height, width))
    for box, found in zip(boxes.int().tolist(), turned.tolist(), strict=True):
        image = torch.zeros(1, 3, height, width)
        image[..., box[1] : box[3], box[0] : box[2]] = 1
        seen = turn_images(image, turns)[0, 0].numpy()
        assert np.array_equal(seen, np.rot90(image[0, 0].numpy(), turns))
        rows, columns = np.nonzero(seen)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found == expected


def term(student=None, teacher=None, **options):
    options = {"TEACHER_ITERS": 10, **options}
    return build_term("hsakd", student, teacher or spec(channels=3), **options)


def backbone(channels):
    """A made-up one: each channel its own mixture of the pooled pixels and their places."""

    def run(pixels):
        mixture = torch.linspace(-1, 2, 3 * channels).view(channels, 3, 1, 1)
        maps = F.conv2d(pixels, mixture)
        return {f"p{i + 2}": F.avg_pool2d(maps, s) for i, s in enumerate((4, 8))}

    return run


def passes():
    """Both networks on two noise images of 16 x 32 pixels, with three labelled boxes."""
    pixels = torch.randn(2, 3, 16, 32)
    boxes = [torch.tensor([[2.0, 1, 14, 15], [16, 4, 30, 12]]), torch.tensor([[5.0, 2, 11, 16]])]
    classes = [torch.tensor([0, 1]), torch.tensor([1])]
    sampled = [
        Instances((16, 32), proposal_boxes=Boxes(b), gt_classes=c)
        for b, c in zip(boxes, classes, strict=True)
    ]
    found = []
    for channels in (2, 3):
        run = backbone(channels)
        found.append(
            DetectorPass(
                images=ImageList(pixels, [(16, 32)] * 2),
                features={n: x.requires_grad_() for n, x in run(pixels).items()},
                strides={"p2": 4, "p3": 8},
                run_backbone=run,
            )
        )
    found[0].sampled = sampled
    return found


def logits_by_hand(heads, run, network, turns):
    """Turns by numpy, boxes by their corners, pooling by torchvision."""
    pixels = network.images.tensor
    turned = torch.from_numpy(np.rot90(pixels.numpy(), turns, (2, 3)).copy())
    rows = [[0, 2, 1, 14, 15], [0, 16, 4, 30, 12], [1, 5, 2, 11, 16]]
    width, height = 32, 16
    corners = {  # of (x, y) in the turned image
        0: lambda x, y: (x, y),
        1: lambda x, y: (y, width - x),
        2: lambda x, y: (width - x, height - y),
        3: lambda x, y: (height - y, x),
    }[turns]
    placed = []
    for image, *box in rows:
        a, b = corners(*box[:2]), corners(*box[2:])
        placed.append([image, min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1])])
    maps = run(turned)
    return [
        head(roi_align(maps[f"p{i + 2}"], torch.tensor(placed).float(), 2, 1 / s, 2, aligned=True))
        for i, (head, s) in enumerate(zip(heads, (4, 8), strict=True))
    ]


@pytest.mark.parametrize("turned", [0, 1, 2, 3])
def test_both_phases_by_a_composition_of_their_own(turned):
    torch.manual_seed(4)
    hsakd = term(TURNED=turned)
    student, teacher = passes()
    generator = torch.Generator()
    generator.set_state(hsakd.get_extra_state())
    by_turn = {0: 1.0}
    if turned:
        drawn = torch.randperm(3, generator=generator)[:turned].tolist()
        by_turn = {0: 0.25, **{j + 1: 0.75 / turned for j in drawn}}
        assert len(by_turn) == 1 + turned
    state = hsakd.get_extra_state()
    with EventStorage(9):
        loss = hsakd(student, teacher, NOTHING)
    cross_entropy, divergence = 0.0, 0.0
    labels = {j: torch.tensor([j, 4 + j, 4 + j]) for j in range(4)}
    for j, share in by_turn.items():
        theirs = logits_by_hand(hsakd.teacher_heads, backbone(3), teacher, j)
        ours = logits_by_hand(hsakd.student_heads, backbone(2), student, j)
        for s, t in zip(ours, theirs, strict=True):
            assert s.shape == t.shape == (3, 8)
            cross_entropy += share * -t.log_softmax(1)[range(3), labels[j]].mean()
            p, q = (s.double() / 3).softmax(1), (t.double() / 3).softmax(1)
            divergence += share * 9 * (q * (q / p).log()).sum(1).mean()
    assert loss.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad.any() for p in hsakd.teacher_heads.parameters() if p.dim() > 1)
    assert not any(p.grad.any() for p in hsakd.student_heads.parameters())
    assert teacher.features["p2"].grad is None and not student.features["p2"].grad.any()

    hsakd.zero_grad()
    hsakd.set_extra_state(state)
    with EventStorage(10):
        loss = hsakd(student, teacher, NOTHING)
    assert loss.item() == pytest.approx(divergence.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad.any() for p in hsakd.student_heads.parameters() if p.dim() > 1)
    assert not any(p.grad.any() for p in hsakd.teacher_heads.parameters())
    assert teacher.features["p2"].grad is None and student.features["p2"].grad.any()


@rule("Mutual heads learn from labels and from each other as from constants")
def test_the_mutual_form_by_a_composition_of_its_own():
    """Both sides' labels and both divergences; each learns from the other as from a constant."""
    torch.manual_seed(6)
    hsakd = term(TURNED=3, MUTUAL=True, TEACHER_ITERS=-1)
    assert hsakd.parameter_groups() == []
    student, teacher = passes()
    with EventStorage(0):
        loss = hsakd(student, teacher, NOTHING)
    expected = {"both": 0.0, "student": 0.0}
    for j in range(4):
        theirs = logits_by_hand(hsakd.teacher_heads, backbone(3), teacher, j)
        ours = logits_by_hand(hsakd.student_heads, backbone(2), student, j)
        labels = torch.tensor([j, 4 + j, 4 + j])
        for s, t in zip(ours, theirs, strict=True):
            hard = [-x.log_softmax(1)[range(3), labels].mean() for x in (s, t)]
            p, q = ((x.double() / 3).softmax(1) for x in (s, t))
            soft = [9 * (a * (a / b).log()).sum(1).mean() for a, b in ((q.detach(), p), (p, q))]
            expected["both"] += 0.25 * (sum(hard) + sum(soft)).item()
            expected["student"] += 0.25 * (hard[0] + soft[0])
    assert loss.item() == pytest.approx(expected["both"], rel=1e-4)
    heads = list(hsakd.student_heads.parameters())
    found = torch.autograd.grad(loss, heads, retain_graph=True)
    by_hand = torch.autograd.grad(expected["student"], heads)
    for a, b in zip(found, by_hand, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    loss.backward()
    assert all(p.grad.any() for p in hsakd.teacher_heads.parameters() if p.dim() > 1)
    assert teacher.features["p2"].grad is None and student.features["p2"].grad.any()


def test_boxes_of_no_class_have_no_label_and_no_boxes_no_loss():
    hsakd = term(TURNED=0)
    student, teacher = passes()
    with EventStorage(0):
        student.sampled[0].gt_classes[1] = -1
        two = hsakd(student, teacher, NOTHING).item()
        student.sampled = [x[x.gt_classes >= 0] for x in student.sampled]
        assert hsakd(student, teacher, NOTHING).item() == pytest.approx(two)
        student.sampled = [x[:0] for x in student.sampled]
        loss = hsakd(student, teacher, NOTHING)
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None for p in hsakd.parameters())


def draws(hsakd, number):
    """The first pixels of the turned images of so many forwards, which tell their turns."""
    student, teacher = passes()
    seen = []

    def watch(pixels):
        seen.append(pixels.flatten()[:3].tolist())
        return backbone(3)(pixels)

    teacher.images = ImageList(torch.arange(3.0 * 16 * 32).view(1, 3, 16, 32), [(16, 32)])
    teacher.images.tensor = teacher.images.tensor.expand(2, -1, -1, -1)
    teacher.run_backbone = watch
    state = torch.get_rng_state()
    with EventStorage(0):
        for _ in range(number):
            hsakd(student, teacher, NOTHING)
    assert torch.equal(torch.get_rng_state(), state)
    return seen


@rule("A term that draws random numbers has a generator of its own, saved with it")
def test_turns_are_drawn_by_the_terms_own_generator_and_saved_with_it():
    hsakd = term()
    draws(hsakd, 2)
    saved = copy.deepcopy(hsakd.state_dict())
    following = draws(hsakd, 6)
    assert len({tuple(x) for x in following}) > 1
    assert draws(term(seed=8), 8)[2:] != following
    resumed = term(seed=8)
    resumed.load_state_dict(saved)
    assert draws(resumed, 6) == following


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"TEMPERATURE": 0.0}, "HKD.HSAKD.TEMPERATURE is 0.0"),
        ({"TEACHER_LR_FACTOR": 0.0}, "HKD.HSAKD.TEACHER_LR_FACTOR is 0.0"),
        ({"TURNED": 4}, "HKD.HSAKD.TURNED is 4; choose from 0, 1, 2, 3"),
        ({"TEACHER_ITERS": 20}, "TEACHER_ITERS is 20 and SOLVER.MAX_ITER 20; give fewer"),
        ({"LEVELS": ["p9"]}, "HKD.HSAKD.LEVELS names 'p9'"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        term(**options)


def test_a_one_stage_student_is_refused():
    with pytest.raises(ValueError, match="one-stage; drop 'hsakd'"):
        term(spec(one_stage=True))


@pytest.fixture
def hsakd_cfg(hkd_cfg):
    hkd_cfg.HKD.TERMS = ["hsakd"]
    hkd_cfg.HKD.HSAKD.TEACHER_ITERS = 2
    return hkd_cfg


@pytest.mark.long
@rule("Neutrality: with weights 0 a run equals plain Detectron2 bit for bit")
@pytest.mark.parametrize(
    "norm, channels_last, mutual", [("GN", False, False), ("BN", True, False), ("BN", False, True)]
)
def test_weight_zero_equals_plain_detectron2_bit_for_bit(
    student_cfg, hsakd_cfg, build, norm, channels_last, mutual
):
    """In both phases; batch norms keep the running statistics of the upright images."""
    hsakd_cfg.HKD.POOLER, hsakd_cfg.HKD.CHANNELS_LAST = "torchvision", channels_last
    hsakd_cfg.HKD.HSAKD.update(WEIGHT=0.0, TURNED=3, MUTUAL=mutual)
    for cfg in (student_cfg, hsakd_cfg):
        cfg.MODEL.RESNETS.NORM = norm
    batches = [make_batch(seed=s) for s in range(4)]
    plain, distilled = build(student_cfg), build(hsakd_cfg)
    if channels_last:
        plain_in_channels_last(plain)
    expected, _ = steps(plain, batches)
    found, storage = steps(distilled, batches)
    for (losses, grads, state), (losses0, grads0, state0) in zip(found, expected, strict=True):
        assert all(torch.equal(losses[n], x) for n, x in losses0.items())
        assert all(torch.equal(grads[n], x) for n, x in grads0.items())
        assert torch.equal(state, state0)
    assert storage.history("hkd/hsakd_raw").latest() > 0.1
    state, state0 = distilled.state_dict(), plain.state_dict()
    assert list(state) == list(state0)
    assert all(torch.equal(state[k], state0[k]) for k in state0)


@rule("HSAKD's teacher heads move in their phase and never after")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_teachers_heads_learn_in_their_phase_and_never_after(hsakd_cfg, build, optimizer):
    hsakd_cfg.HKD.SOLVER.OPTIMIZER = optimizer
    hsakd_cfg.HKD.HSAKD.TEACHER_LR_FACTOR = 1.23
    hsakd_cfg.SOLVER.WEIGHT_DECAY = 0.1
    model = build(hsakd_cfg)
    check_terms(model)
    found = build_optimizer(hsakd_cfg, model)
    check_optimizer(model, found)
    lr = {"sgd": 0.0123, "adamw": 0.01}[optimizer]
    assert found.param_groups[-1]["lr"] == pytest.approx(lr)
    hsakd = model.terms["hsakd"]
    histories = {"teacher": [], "student": []}
    with EventStorage(0) as storage:
        for seed in range(4):
            found.zero_grad()
            sum(model(make_batch(seed=seed)).values()).backward()
            before = copy.deepcopy(hsakd)
            found.step()
            for side, history in histories.items():
                heads, heads0 = (getattr(x, f"{side}_heads").parameters() for x in (hsakd, before))
                history.append(all(torch.equal(a, b) for a, b in zip(heads, heads0, strict=True)))
            storage.step()
    assert histories["teacher"] == [False, False, True, True]
    assert histories["student"][2:] == [False, False]


@pytest.mark.long
def test_heads_learn_the_turns_then_the_student_the_heads(hsakd_cfg, build, tmp_path):
    hsakd_cfg.HKD.HSAKD.update(TEACHER_ITERS=12, TURNED=3)
    hsakd_cfg.HKD.HSAKD.LEVELS = ["p2", "p3"]
    model = build(hsakd_cfg)
    record, _ = steps(model, [make_batch()] * 20, lr=0.02)
    losses = [step[0]["loss_hkd_hsakd"].item() for step in record]
    assert losses[11] < 0.9 * losses[0]
    assert losses[19] < 0.9 * losses[12]
    StudentCheckpointer(model, str(tmp_path)).save("model")
    file = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(file["model"]) == list(model.student.state_dict())
    assert {k.split(".")[1] for k in file["hkd"]} == {
        "student_heads",
        "teacher_heads",
        "_extra_state",
    }
    again = build(hsakd_cfg, seed=1)
    StudentCheckpointer(again, str(tmp_path)).load(str(tmp_path / "model.pth"))
    state, state0 = again.terms.state_dict(), model.terms.state_dict()
    assert state.keys() == state0.keys()
    assert all(torch.equal(state[k], state0[k]) for k in state0)


@pytest.mark.long
def test_mutual_heads_learn_from_each_other_all_the_time(hsakd_cfg, build):
    hsakd_cfg.HKD.HSAKD.update(MUTUAL=True, TURNED=3, LEVELS=["p2", "p3"])
    model = build(hsakd_cfg)
    optimizer = build_optimizer(hsakd_cfg, model)
    check_optimizer(model, optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {hsakd_cfg.SOLVER.BASE_LR}
    before = copy.deepcopy(model.terms["hsakd"])
    record, _ = steps(model, [make_batch()] * 12, lr=0.02)
    losses = [step[0]["loss_hkd_hsakd"].item() for step in record]
    assert losses[11] < 0.9 * losses[0]
    for a, b in zip(model.terms["hsakd"].parameters(), before.parameters(), strict=True):
        assert not torch.equal(a, b)


def test_one_step_beside_the_terms_of_hkd(hkd_cfg, build):
    hkd_cfg.HKD.TERMS = ["pyramid", "region", "logit", "hsakd"]
    hkd_cfg.HKD.HSAKD.TEACHER_ITERS = 1
    record, _ = steps(build(hkd_cfg), [make_batch(seed=s) for s in range(2)])
    for losses, grads, _ in record:
        assert losses["loss_hkd_hsakd"] > 0
        assert all(x.isfinite().all() for x in [*losses.values(), *grads.values()])
