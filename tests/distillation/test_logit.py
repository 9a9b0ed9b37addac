"""The published parts of the logit term against numbers worked by hand."""

from math import log

import pytest
import torch
from detectron2.structures import Boxes, Instances

from helpers.rules import rule
from helpers.small_maps import NOTHING, build_term, dense_spec, passed, spec
from hkd_d2.distillation.detector_pass import DenseOutputs, RegionOutputs
from hkd_d2.distillation.term import DENSE, PREDICTIONS

pytestmark = rule("A published method has its own normaliser and weight, by hand")


def with_rpn(**options):
    return spec(dense=dense_spec(**options))


def logit(*parts, student=None, **options):
    return build_term("logit", student or with_rpn(), PARTS=list(parts), **options)


def logits_of(probabilities, scale=1.0):
    """Logits whose softmax at temperature ``scale`` is given, a constant a row added."""
    rows = torch.tensor(probabilities, dtype=torch.float64).log()
    return scale * rows + torch.arange(len(rows), dtype=torch.float64)[:, None]


def passes(student_logits, teacher_logits, classes, dense=(None, None)):
    """Two passes of one image whose boxes have these class logits."""
    found = []
    for logits, outputs in zip((student_logits, teacher_logits), dense, strict=True):
        rows = len(logits)
        regions = RegionOutputs([], None, torch.zeros(rows, 3), logits, torch.zeros(rows, 4))
        sampled = Instances((64, 64), proposal_boxes=Boxes(torch.zeros(rows, 4)))
        sampled.gt_classes = torch.tensor(classes, dtype=torch.int64)
        found.append(passed(dense=outputs, sampled=[sampled], regions=regions))
    return found


# One class. Objects: row 0; background: rows 1 and 2.
STUDENT = [[1 / 2, 1 / 2], [2 / 3, 1 / 3], [0.9, 0.1]]
TEACHER = [[3 / 4, 1 / 4], [1 / 4, 3 / 4], [0.9, 0.1]]
CLASSES = [0, 1, 1]
# 3/4 ln 3/2 + 1/4 ln 1/2 and 1/4 ln 3/8 + 3/4 ln 9/4
KL_0, KL_1 = 0.130812, 0.362990


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_defeat_head_by_hand(temperature):
    """T^2 KL over the boxes of objects and over those of the background, each by its number."""
    ours = logits_of(STUDENT, temperature).requires_grad_()
    s, t = passes(ours, logits_of(TEACHER, temperature), CLASSES)

    def value(*parts, weights=()):
        term = logit(*parts, TEMPERATURE=temperature, PART_WEIGHTS=list(weights))
        return term(s, t, NOTHING)

    square = temperature**2
    assert value("kl_foreground").item() == pytest.approx(square * KL_0, abs=2e-6)
    assert value("kl_background").item() == pytest.approx(square * KL_1 / 2, abs=2e-6)
    both = value("kl_foreground", "kl_background", weights=(2.0, 2.0))
    assert both.item() == pytest.approx(square * (2 * KL_0 + 2 * KL_1 / 2), abs=5e-6)
    both.backward()
    # d/dx of 2 T^2 KL is 2 T (p - q); of the background half of that a row.
    expected = [[-0.25, 0.25], [0.416667, -0.416667], [0.0, 0.0]]
    slopes = 2 * temperature * torch.tensor(expected, dtype=torch.float64)
    slopes[1:] /= 2
    assert torch.allclose(ours.grad, slopes, atol=1e-5)


def test_boxes_of_one_kind_alone():
    s, t = passes(logits_of(STUDENT[:1]), logits_of(TEACHER[:1]), [0])
    assert logit("kl_background")(s, t, NOTHING).item() == 0
    s, t = passes(logits_of(STUDENT[1:]), logits_of(TEACHER[1:]), [1, 1])
    assert logit("kl_foreground")(s, t, NOTHING).item() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dkd_by_hand(temperature):
    """Two classes and the background; row 0 is of class 0, row 1 of the background."""
    ours = logits_of([[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2]], temperature).requires_grad_()
    theirs = logits_of([[1 / 4, 1 / 2, 1 / 4], [1 / 8, 1 / 8, 3 / 4]], temperature)
    s, t = passes(ours, theirs, [0, 2])

    def value(*parts, weights=()):
        options = {"TEMPERATURE": temperature, "PART_WEIGHTS": list(weights)}
        return logit(*parts, student=spec(num_classes=2), **options)(s, t, NOTHING)

    # tckd, row 0: 1/4 ln 1/2 + 3/4 ln 3/2; row 1: 3/4 ln 3/2 + 1/4 ln 1/2: the same.
    tckd = 0.130812
    # nckd, row 0: (2/3, 1/3) from (1/2, 1/2): 2/3 ln 4/3 + 1/3 ln 2/3; row 1: 0.
    nckd = 0.056633 / 2
    square = temperature**2
    assert value("tckd").item() == pytest.approx(square * tckd, abs=2e-6)
    assert value("nckd").item() == pytest.approx(square * nckd, abs=2e-6)
    dkd = value("tckd", "nckd", weights=(1.0, 0.25))
    assert dkd.item() == pytest.approx(square * (tckd + 0.25 * nckd), abs=2e-6)
    dkd.backward()
    assert (ours.grad.abs().sum(1) > 0).all()
    # The divergence is tckd plus the teacher's mass of the other classes times nckd, row by row.
    whole = square * (tckd + 0.75 * nckd)
    assert value("kl").item() == pytest.approx(whole, abs=2e-6)


def test_dkd_of_one_class_is_its_first_half():
    s, t = passes(logits_of(STUDENT).requires_grad_(), logits_of(TEACHER), CLASSES)
    assert logit("nckd")(s, t, NOTHING).item() == 0
    assert logit("tckd")(s, t, NOTHING).item() == pytest.approx((KL_0 + KL_1) / 3, abs=2e-6)


def test_chen_cross_entropy_by_hand():
    # row 0: -(3/4 + 3/2 x 1/4) ln 1/2; row 1: 1/4 ln 3/2 + 3/2 x 3/4 ln 3
    # row 2: -(0.9 ln 0.9 + 3/2 x 0.1 ln 0.1)
    ours = logits_of(STUDENT).requires_grad_()
    s, t = passes(ours, logits_of(TEACHER), CLASSES)
    loss = logit("cross_entropy")(s, t, NOTHING)
    assert loss.item() == pytest.approx((0.779791 + 1.337305 + 0.440212) / 3, abs=2e-6)
    loss.backward()
    assert (ours.grad.abs().sum(1) > 0).all()
    # Without the background's weight: the teacher's entropy more than kl.
    entropy = -sum(q * log(q) for row in TEACHER for q in row) / 3
    plain = logit("cross_entropy", BACKGROUND_WEIGHT=1.0)(s, t, NOTHING).item()
    assert plain == pytest.approx((KL_0 + KL_1) / 3 + entropy, abs=2e-6)


def rpn_outputs(probabilities, deltas):
    """Two images, levels of two anchors and one; ``deltas`` are dx of each anchor."""
    x = torch.tensor(probabilities, dtype=torch.float64)
    x = (x / (1 - x)).log()
    dx = torch.zeros(2, 3, 4, dtype=torch.float64)
    dx[..., 0] = torch.tensor(deltas, dtype=torch.float64)
    anchors = torch.tensor([[0.0, 0, 10, 20], [40, 0, 60, 20], [0, 0, 40, 40]])
    outputs = DenseOutputs(
        logits=[x[:, :2].clone(), x[:, 2:].clone()],
        deltas=[dx[:, :2].clone(), dx[:, 2:].clone()],
        anchors=[Boxes(anchors[:2]), Boxes(anchors[2:])],
    )
    for y in [*outputs.logits, *outputs.deltas]:
        y.requires_grad_()
    return outputs


def test_chen_on_the_rpn_by_hand():
    """The anchors of the minibatch, in anchor order; 0.99 and 9 stand where nobody may look."""
    student = rpn_outputs([[0.5, 0.99, 0.9], [0.01, 0.01, 2 / 3]], [[0.3, 9, 0.4], [9, 9, 9]])
    teacher = rpn_outputs([[0.75, 0.01, 0.9], [0.99, 0.99, 0.25]], [[0.5, 9, 0.3], [9, 9, 9]])
    # Objects: anchors 0 and 2 of image 0; background: anchor 2 of image 1.
    student.sampled_labels = [torch.tensor([0, -1, 0]), torch.tensor([-1, -1, 1])]
    student.labels = [torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])]
    truth = torch.tensor([[1.0, 0, 11, 20], [40, 0, 60, 20], [4, 0, 44, 40]])  # dx 0.1 and 0.1
    student.matched_boxes = [truth, truth]
    s, t = passes(torch.zeros(0, 2), torch.zeros(0, 2), [], dense=(student, teacher))

    loss = logit("rpn_cross_entropy")(s, t, NOTHING)
    # As the rows of test_chen_cross_entropy_by_hand.
    assert loss.item() == pytest.approx((0.779791 + 1.337305 + 0.440212) / 3, abs=2e-6)
    # Anchor 0: 0.2^2 + 0.01 < 0.4^2, so it is good enough; anchor 2: 0.3^2 > 0.2^2. By 3 anchors.
    bounded = logit("rpn_bounded")(s, t, NOTHING)
    assert bounded.item() == pytest.approx(0.09 / 3, rel=1e-5)
    (loss + bounded).backward()
    assert [x.grad.tolist()[0][0] != 0 for x in student.logits] == [True, True]
    assert student.logits[0].grad[:, 1].tolist() == [0, 0]  # anchors outside the minibatch
    assert student.logits[1].grad[1, 0] != 0
    assert student.deltas[0].grad.abs().sum() == 0 and student.deltas[1].grad[0, 0, 0] > 0
    # A teacher whose deltas are of weights 2 means half: 0.25 and 0.15, both better than ours.
    twice = with_rpn(weights=(2.0, 2.0, 2.0, 2.0))
    halved = logit("rpn_bounded", teacher=twice)(s, t, NOTHING)
    assert halved.item() == pytest.approx((0.04 + 0.09) / 3, rel=1e-5)


def test_no_boxes_give_the_rpns_parts_and_a_gradient():
    student = rpn_outputs([[0.5] * 3] * 2, [[0.0] * 3] * 2)
    student.sampled_labels = [torch.tensor([-1, -1, -1]), torch.tensor([1, -1, -1])]
    student.matched_boxes = [torch.zeros(3, 4)] * 2
    teacher = rpn_outputs([[0.75] * 3] * 2, [[0.0] * 3] * 2)
    s, t = passes(torch.zeros(0, 2), torch.zeros(0, 2), [], dense=(student, teacher))
    term = logit("hidden", "nckd", "rpn_cross_entropy", "rpn_bounded", teacher=wider())
    t.regions.hidden = torch.zeros(0, 5)
    s.regions.hidden.requires_grad_()
    loss = term(s, t, NOTHING)
    assert loss.item() == pytest.approx(0.779791, abs=2e-6)
    loss.backward()
    assert all((p.grad == 0).all() for p in term.parameters()) and len(list(term.parameters())) == 2
    # No anchor at all was sampled.
    student.sampled_labels = [torch.full((3,), -1)] * 2
    assert term(s, t, NOTHING).item() == 0


def wider():
    return spec(hidden_channels=5, dense=dense_spec())


def test_what_the_teacher_is_asked_for():
    assert DENSE not in logit("kl", "bounded").needs
    assert PREDICTIONS not in logit("rpn_bounded").needs
    assert {DENSE, PREDICTIONS} <= logit("cross_entropy", "rpn_bounded").needs
    # Objectness has no classes: other class lists are welcome.
    logit("rpn_cross_entropy", teacher=spec(num_classes=80, dense=dense_spec()))


@rule("Dense heads are compared on the same anchors or refused")
@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"parts": ["rpn_bounded"], "anchor": 20}, "'logit' compares both networks anchor by anch"),
        ({"parts": ["kl"], "BACKGROUND_WEIGHT": -1.0}, "HKD.LOGIT.BACKGROUND_WEIGHT is -1.0"),
        ({"parts": ["dkd"]}, "choose from hidden, .*tckd, nckd, .*rpn_bounded"),
    ],
)
def test_what_is_refused(options, sentence):
    parts, anchor = options.pop("parts"), options.pop("anchor", 16)
    with pytest.raises(ValueError, match=sentence):
        logit(*parts, teacher=with_rpn(sizes=[[anchor], [32]]), **options)
