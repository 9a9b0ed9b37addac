"""The ADL term: published values by hand, masks, class maps, RPNs and one-stage heads."""

import functools
import math

import pytest
import torch
from detectron2.structures import Boxes

from helpers.rules import rule
from helpers.small_detectors import make_batch, one_stage_config, save_teacher, small_config
from helpers.small_maps import NOTHING, build_term, dense_spec, one_stage_spec, passed, spec
from helpers.training_steps import steps
from hkd_d2.distillation.detector_pass import DenseOutputs

RETINANET = one_stage_spec()
adl = functools.partial(build_term, "adl")


def anchors(strides=(8, 16), **options):
    return dense_spec("RetinaNet", strides, **options)


def passed_logits(logits, labels=None):
    """A pass of one image; ``logits`` one tensor a level."""
    anchors = [Boxes(torch.zeros(x.shape[1], 4)) for x in logits]
    return passed(dense=DenseOutputs(logits=logits, deltas=[], anchors=anchors, labels=labels))


def kind_of(head, **fields):
    if head != "RPN":
        return one_stage_spec(head, **fields)
    return spec((8, 16), dense=dense_spec("RPN", (8, 16)), **fields)


def logit(q):
    return math.log(q / (1 - q))


@rule("ADL gives the released code's values and the paper's, finite for a certain teacher")
@pytest.mark.parametrize(
    "x, q, outer, loss, slope",
    [  # gamma 2, alpha 0.5, beta_c 0: the released form, its gradient, and the paper's form
        (0.3, 0.7, "bce", 0.072691041, -0.034339735),
        (-4.0, 0.01, "bce", 0.000092787, 0.000037496),
        (0.3, 0.7, "kl", 0.007556364, None),
        (-4.0, 0.01, "kl", 0.000006856, None),
    ],
)
@pytest.mark.parametrize("head", ["RetinaNet", "FCOS", "RPN"])
def test_reference_values(x, q, outer, loss, slope, head):
    # One anchor is background and one is neither; q^1.8 < 1, so the normaliser is 1.
    student = torch.tensor([[x, 5.0]], dtype=torch.float64)
    teacher = torch.tensor([[logit(q), logit(1e-9)]], dtype=torch.float64)
    if head != "RPN":
        student, teacher = student[..., None], teacher[..., None]
    student.requires_grad_()
    term = adl(kind_of(head), OUTER=outer)
    labels = [torch.tensor([1, -1])]
    found = term(passed_logits([student], labels), passed_logits([teacher]), NOTHING)
    assert found.item() == pytest.approx(loss, abs=1e-8)
    found.backward()
    gradient = student.grad.flatten()
    assert gradient[1] == 0
    if slope is not None:
        assert gradient[0].item() == pytest.approx(slope, abs=1e-8)


def test_sum_over_anchors_and_classes_by_the_teachers_mass():
    """Two levels, two classes: the released formula written out."""
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(2, n, 2, generator=g) for n in (5, 3)]
    z = [2 * torch.randn(2, n, 2, generator=g) + 1 for n in (5, 3)]
    labels = [torch.tensor([0, 2, -1, 1, 2, -1, 0, 2]), torch.tensor([2, 2, 2, 2, -1, 1, 2, -1])]
    kinds = one_stage_spec(num_classes=2)
    found = adl(kinds, ALPHA=0.3, THETA=1.5, BETA_C=0.5)(
        passed_logits(x, labels), passed_logits(z), NOTHING
    )
    counted = torch.stack(labels) >= 0
    p, q = torch.cat(x, 1).double().sigmoid(), torch.cat(z, 1).double().sigmoid()
    entropy = -(q * q.log() + (1 - q) * (1 - q).log())
    d = -(q * p.log() + (1 - q) * (1 - p).log()) - 0.5 * entropy
    a = 1 - (-d.clamp(min=0)).exp()
    losses = -(a**2) * (0.3 * q * p.log() + 0.7 * (1 - q) * (1 - p).log())
    mass = (q**1.5).sum()
    assert mass > 1 and not counted.all()
    assert found.item() == pytest.approx((losses[counted].sum() / mass).item(), rel=1e-5)


@rule("ADL gives the released code's values and the paper's, finite for a certain teacher")
@pytest.mark.parametrize("outer", ["bce", "kl"])
def test_a_teacher_that_is_sure(outer):
    """Probabilities of exactly 0 and 1 give finite losses and slopes."""
    student = torch.tensor([[[0.5], [0.5], [200.0], [-200.0]]], requires_grad=True)
    teacher = torch.tensor([[[200.0], [-200.0], [200.0], [-200.0]]])
    assert set(teacher.sigmoid().flatten().tolist()) == {0.0, 1.0}
    labels = [torch.tensor([0, 1, 0, 1])]
    ours, theirs = passed_logits([student], labels), passed_logits([teacher])
    loss = adl(RETINANET, OUTER=outer)(ours, theirs, NOTHING)
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert torch.isfinite(student.grad).all()
    slopes = student.grad.flatten().tolist()
    assert slopes[0] < 0 < slopes[1] and slopes[2:] == [0, 0]


def test_class_map_picks_the_teachers_classes():
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(1, 4, 1, generator=g), torch.randn(1, 4, 3, generator=g)
    labels = [torch.zeros(4, dtype=torch.int64)]
    ours = passed_logits([x], labels)
    term = adl(RETINANET, one_stage_spec(num_classes=3), class_map=[2])
    mapped = term(ours, passed_logits([z]), NOTHING)
    direct = adl(RETINANET)(ours, passed_logits([z[..., 2:]]), NOTHING)
    assert mapped.item() == direct.item() > 0
    with pytest.raises(ValueError, match="1 classes and the teacher 3.*or drop 'adl'"):
        adl(RETINANET, one_stage_spec(num_classes=3))
    # Objectness has no classes: other class lists are welcome on an RPN.
    adl(kind_of("RPN"), kind_of("RPN", num_classes=80))


def test_no_labelled_anchor_gives_zero_with_a_gradient():
    x = torch.randn(1, 3, 1, requires_grad=True)
    loss = adl(RETINANET)(
        passed_logits([x], [torch.full((3,), -1)]), passed_logits([torch.randn(1, 3, 1)]), NOTHING
    )
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


@rule("Dense heads are compared on the same anchors or refused")
@pytest.mark.parametrize(
    "teacher, sentence",
    [
        (one_stage_spec("FCOS"), "one of RetinaNet, the teacher one of FCOS"),
        (one_stage_spec(dense=anchors(sizes=[[32], [65]])), "make MODEL.ANCHOR_GENERATOR"),
        (one_stage_spec(dense=anchors(sizes=[[32, 40], [64, 80]])), "make MODEL.ANCHOR_GEN"),
        (one_stage_spec(dense=anchors(strides=(16, 32))), r"strides \[8, 16\].* \(\[16, 32\]\)"),
        (one_stage_spec(dense=anchors(offset=0.5)), "make MODEL.ANCHOR_GENERATOR"),
    ],
)
def test_pairs_that_do_not_fit(teacher, sentence):
    with pytest.raises(ValueError, match=sentence):
        adl(RETINANET, teacher)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"OUTER": "mse"}, "HKD.ADL.OUTER is 'mse'; choose from bce, kl"),
        ({"GAMMA": -1.0}, "HKD.ADL.GAMMA is -1.0"),
        ({"THETA": -1.0}, "HKD.ADL.THETA is -1.0"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        adl(RETINANET, **options)


@pytest.mark.parametrize("rpn", ["RPN", "IgnoreAwareRPN"])
def test_objectness_of_two_stage_detectors(teacher_files, build, rpn):
    """Anchors between the RPN's thresholds and in ignore regions are left out, sampled or not."""
    cfg = small_config()
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.ROI_HEADS.NAME = rpn, "IgnoreAwareROIHeads"
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = teacher_files
    cfg.HKD.TERMS = ["adl"]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 4  # the sampling must not show
    model = build(cfg)
    seen = {}
    forward = model.terms["adl"].forward

    def spy(student, teacher, targets):
        seen["labels"], seen["logits"] = student.dense.labels, student.dense.logits
        seen["teacher"] = teacher
        return forward(student, teacher, targets)

    model.terms["adl"].forward = spy
    batch = make_batch(ignore=rpn != "RPN")
    record, _ = steps(model, [batch])
    losses, grads, _ = record[0]
    assert losses["loss_hkd_adl"] > 0
    assert grads["proposal_generator.rpn_head.objectness_logits.weight"].abs().sum() > 0
    assert seen["teacher"].regions is None and seen["teacher"].proposals is None
    labels = torch.stack(seen["labels"])
    assert labels.shape[1] == sum(x.shape[1] for x in seen["logits"])
    assert (labels == 0).sum() >= 4 and (labels == 1).sum() > 100  # objects, background
    assert (labels == -1).any() and set(labels.unique().tolist()) == {-1, 0, 1}


def test_a_student_with_other_anchors_is_refused(tmp_path, build):
    cfg = one_stage_config("RetinaNet")
    files = save_teacher(cfg, tmp_path)
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = files
    cfg.HKD.TERMS = ["adl"]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
    with pytest.raises(ValueError, match="compares both networks anchor by anchor"):
        build(cfg)
