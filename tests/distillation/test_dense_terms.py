"""Region and logit terms of one-stage detectors against numbers worked by hand."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torchvision.ops import roi_align

from helpers.rules import rule
from helpers.small_maps import NOTHING, build_term, dense_spec, one_stage_spec, passed, spec
from hkd_d2.distillation.detector_pass import DenseOutputs, Targets

pytestmark = rule(
    "Weights are scale-free: a term is a mean, but for FGD and MGD, published as sums"
)


def kind_of(head, classes=1, weights=(1.0,) * 4, levels=(3, 4, 5)):
    """A one-stage detector; ``head`` None for a two-stage one."""
    strides = [2**level for level in levels]
    dense = dense_spec(head or "RPN", strides, weights=weights)
    fields = {"dense": dense, "num_classes": classes, "delta_weights": weights}
    return one_stage_spec(head, strides, **fields) if head else spec(strides, **fields)


# Two images, two levels of four and two anchors, two classes: 0 and 1 objects, 2 background.
LABELS = [torch.tensor([0, 2, -1, 2, 1, 2]), torch.tensor([2, 2, 1, -1, -1, 2])]
FOREGROUND = (torch.stack(LABELS) >= 0) & (torch.stack(LABELS) < 2)


def outputs(seed, anchors=None):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.tensor([[8.0 * i, 4, 8 * i + 16, 36] for i in range(6)])
    return DenseOutputs(
        logits=[torch.randn(2, n, 2, generator=g) for n in (4, 2)],
        deltas=[torch.randn(2, n, 4, generator=g) for n in (4, 2)],
        anchors=[Boxes(boxes[:4]), Boxes(boxes[4:])],
        labels=LABELS,
        matched_boxes=[boxes + torch.tensor([1.0, -2, 3, 4]), boxes + 1],
    )


@pytest.mark.parametrize("head", ["RetinaNet", "FCOS"])
def test_logit_parts_of_dense_heads(head):
    s, t = outputs(0), outputs(1)
    kind = kind_of(head, classes=2)

    def value(*parts, teacher=None, **options):
        term = build_term("logit", kind, teacher or kind, PARTS=list(parts), **options)
        return term(passed(dense=s), passed(dense=t), NOTHING).item()

    number = 3  # anchors of objects
    assert FOREGROUND.sum() == number
    counted = torch.stack(LABELS) >= 0
    x, z = torch.cat(s.logits, 1).double() / 2, torch.cat(t.logits, 1).double() / 2
    q = z.sigmoid()
    bernoulli = q * (F.logsigmoid(z) - F.logsigmoid(x)) + (1 - q) * (
        F.logsigmoid(-z) - F.logsigmoid(-x)
    )
    kl = 4 * bernoulli[counted].sum() / number
    assert value("kl", TEMPERATURE=2.0) == pytest.approx(kl.item(), rel=1e-5)

    ours, theirs = torch.cat(s.deltas, 1)[FOREGROUND], torch.cat(t.deltas, 1)[FOREGROUND]
    deltas = F.smooth_l1_loss(ours, theirs, reduction="sum") / number
    assert value("deltas") == pytest.approx(deltas.item(), rel=1e-6)

    rows = torch.cat([a.tensor for a in s.anchors]).repeat(2, 1)[FOREGROUND.flatten()]
    truth = torch.cat(s.matched_boxes)[FOREGROUND.flatten()]
    target = kind.dense.transform.get_deltas(rows, truth)
    error_s = (ours - target).square().sum(1)
    error_t = (theirs - target).square().sum(1)
    bounded = error_s[error_s + 0.01 > error_t].sum() / number
    assert value("bounded") == pytest.approx(bounded.item(), rel=1e-6)
    both = value("kl", "deltas", TEMPERATURE=2.0, PART_WEIGHTS=[0.5, 2.0])
    assert both == pytest.approx(0.5 * kl.item() + 2 * deltas.item(), rel=1e-5)
    if head == "RetinaNet":  # the teacher's deltas of weights 2 are twice the student's
        twice = kind_of(head, classes=2, weights=(2.0,) * 4)
        halved = F.smooth_l1_loss(ours, theirs / 2, reduction="sum") / number
        assert value("deltas", teacher=twice) == pytest.approx(halved.item(), rel=1e-6)


def test_no_object_gives_no_box_loss_and_a_gradient():
    s, t = outputs(0), outputs(1)
    s.labels = [torch.full((6,), -1)] * 2
    for x in [*s.logits, *s.deltas]:
        x.requires_grad_()
    loss = build_term("logit", kind_of("RetinaNet", classes=2), PARTS=["kl", "deltas", "bounded"])(
        passed(dense=s), passed(dense=t), NOTHING
    )
    loss.backward()
    assert loss.item() == 0
    assert all((x.grad == 0).all() for x in [*s.logits, *s.deltas])


ROWS = torch.tensor([[8.0, 8, 40, 80], [30, 10, 50, 60], [0, 0, 128, 128]])


@rule("Levels are matched by stride, between two-stage and one-stage detectors too")
@pytest.mark.parametrize("boxes", ["gt", "teacher", "sampled"])
def test_region_on_the_common_levels_equals_pooling_by_torchvision(boxes):
    """A two-stage network (p2 to p5) and a one-stage one (p3 to p7) meet on strides 8, 16, 32."""
    two, one = kind_of(None, levels=(2, 3, 4, 5)), kind_of("RetinaNet", levels=(3, 4, 5, 6, 7))
    student, teacher = (two, one) if boxes == "sampled" else (one, two)
    term = build_term(
        "region", student, teacher, BOXES=boxes, TEACHER_TOPK=2, POOLER_RESOLUTION=2,
        POOLER_SAMPLING_RATIO=2,
    )  # fmt: skip
    assert term.student_levels == term.teacher_levels == ["p3", "p4", "p5"]
    assert term.strides == [8, 16, 32]
    g = torch.Generator().manual_seed(0)
    maps = [
        {n: torch.randn(1, 2, 128 // s.stride, 128 // s.stride, generator=g)
         for n, s in kind.levels.items()}
        for kind in (student, teacher)
    ]  # fmt: skip
    rows = ROWS[:2] if boxes == "teacher" else ROWS
    proposals = [Instances((128, 128), proposal_boxes=Boxes(ROWS))]
    found = term(
        passed(features=maps[0], sampled=proposals if boxes == "sampled" else None),
        passed(features=maps[1], proposals=proposals if boxes == "teacher" else None),
        Targets(boxes=[ROWS], ignore_boxes=[torch.zeros(0, 4)]),
    )
    # All three are smaller than 224, so their level is the finest of the common ones.
    pooled = [
        roi_align(m["p3"], [rows], 2, spatial_scale=1 / 8, sampling_ratio=2, aligned=True)
        for m in maps
    ]
    assert found.item() == pytest.approx(F.mse_loss(*pooled).item(), rel=1e-5)


def test_no_common_level_is_refused():
    with pytest.raises(ValueError, match=r"strides \[8.0\] and the teacher's \[16.0\], none in co"):
        build_term(
            "region",
            kind_of("RetinaNet", levels=(3,)),
            kind_of("RetinaNet", levels=(4,)),
            BOXES="gt",
        )
