"""The three terms of HKD against numbers worked by hand and plain PyTorch compositions."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances

from helpers.rules import rule
from helpers.small_detectors import small_config
from helpers.small_maps import NOTHING, build_term, passed, spec
from hkd_d2.distillation import build_terms
from hkd_d2.distillation.detector_pass import RegionOutputs, Targets
from hkd_d2.distillation.logit_box_head import teacher_columns


@rule("Weights are scale-free: a term is a mean, but for FGD and MGD, published as sums")
def test_pyramid_by_hand():
    # p2: 1 x 2 x 2 x 4, every difference 1 -> mean 1; p3: 1 x 2 x 1 x 2, differences 3 -> mean 9
    # mean over levels: (1 + 9) / 2 = 5
    student = passed({"p2": torch.ones(1, 2, 2, 4), "p3": torch.full((1, 2, 1, 2), 3.0)})
    teacher = passed({"p2": torch.zeros(1, 2, 2, 4), "p3": torch.zeros(1, 2, 1, 2)})
    assert build_term("pyramid")(student, teacher, NOTHING).item() == pytest.approx(5)
    # Only p3, as HKD.PYRAMID.LEVELS says.
    term = build_term("pyramid", LEVELS=["p3"])
    assert term(student, teacher, NOTHING).item() == pytest.approx(9)


def test_pyramid_normalised_by_the_teachers_variance():
    # teacher: half of the cells 0, half 2 -> variance 1; ten times that -> variance 100
    t2 = torch.tensor([0.0, 2.0]).repeat(8).view(1, 2, 2, 4)
    t3 = 10 * torch.tensor([0.0, 2.0]).repeat(2).view(1, 2, 1, 2)
    student = passed({"p2": t2 + 1, "p3": t3 + 20})
    teacher = passed({"p2": t2, "p3": t3})
    # p2: 1 / 1, p3: 400 / 100 -> (1 + 4) / 2
    loss = build_term("pyramid", NORMALIZE="teacher_variance")(student, teacher, NOTHING)
    assert loss.item() == pytest.approx(2.5, rel=1e-5)


def test_pyramid_masks_leave_ignore_regions_out():
    difference = torch.zeros(1, 2, 2, 4)
    difference[..., 0, 0] = 1  # under the object
    difference[..., 0, 1] = 5  # under an ignore region only
    difference[..., 1, 3] = 3  # background
    student = passed({"p2": difference, "p3": torch.zeros(1, 2, 1, 2)})
    teacher = passed({"p2": torch.zeros(1, 2, 2, 4), "p3": torch.zeros(1, 2, 1, 2)})
    # stride 4: the object covers cell (0, 0), the region cells (0, 0) and (0, 1)
    targets = Targets(
        boxes=[torch.tensor([[0.0, 0, 4, 4]])], ignore_boxes=[torch.tensor([[0.0, 0, 8, 4]])]
    )
    # foreground: one cell, difference 1 -> 1; level p3 has no box of its own -> 0; mean 1/2
    loss = build_term("pyramid", MASK="boxes")(student, teacher, targets)
    assert loss.item() == pytest.approx(0.5)
    # split: p2 (1 * 1 + 0.25 * 9) / (1 + 0.25 * 6) = 3.25 / 2.5; p3 has background only -> 0
    loss = build_term("pyramid", MASK="split", BACKGROUND_WEIGHT=0.25)(student, teacher, targets)
    assert loss.item() == pytest.approx(3.25 / 2.5 / 2)


@rule("Levels are matched by stride, between two-stage and one-stage detectors too")
def test_levels_are_matched_by_stride_with_adapters():
    student = spec(channels=2)
    teacher = spec((2, 4, 8), 3, names=("q1", "q2", "q3"))
    term = build_term("pyramid", student, teacher)
    assert {k: tuple(a.weight.shape) for k, a in term.adapters.items()} == {
        "p2": (3, 2),
        "p3": (3, 2),
    }
    with torch.no_grad():
        for adapter in term.adapters.values():
            adapter.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
            adapter.bias.copy_(torch.tensor([0.0, 0, 1]))
    s = {"p2": torch.ones(1, 2, 2, 4), "p3": torch.ones(1, 2, 1, 2)}
    t = {
        "q1": torch.full((1, 3, 4, 8), 9.0),  # another stride: not looked at
        "q2": torch.tensor([1.0, 1, 3]).view(1, 3, 1, 1).expand(1, 3, 2, 4),  # adapter's output
        "q3": torch.tensor([1.0, 1, 0]).view(1, 3, 1, 1).expand(1, 3, 1, 2),  # off by 3 in one of 3
    }
    # q2: 0, q3: 9 / 3 = 3 -> mean over levels 1.5
    assert term(passed(s), passed(t), NOTHING).item() == pytest.approx(1.5)


def regions(rows, channels=2, seed=0, deltas=4, classes=1, hidden=3):
    g = torch.Generator().manual_seed(seed)
    return RegionOutputs(
        boxes=[],
        pooled=torch.randn(rows, channels, 2, 2, generator=g),
        hidden=torch.randn(rows, hidden, generator=g),
        class_logits=torch.randn(rows, classes + 1, generator=g),
        deltas=torch.randn(rows, deltas, generator=g),
    )


@pytest.mark.parametrize("distance", ["mse", "l1", "smooth_l1"])
def test_region_on_sampled_boxes(distance):
    s, t = regions(5), regions(5, seed=1)
    term = build_term("region", DISTANCE=distance)
    found = term(passed({}, regions=s), passed({}, regions=t), NOTHING)
    reference = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[distance]
    assert found.item() == pytest.approx(reference(s.pooled, t.pooled).item(), rel=1e-6)
    term = build_term("region", DISTANCE=distance, NORMALIZE="teacher_variance")
    normalised = term(passed({}, regions=s), passed({}, regions=t), NOTHING)
    expected = found.item() / t.pooled.var(correction=0).item()
    assert normalised.item() == pytest.approx(expected, rel=1e-4)


@rule("A published method has its own normaliser and weight, by hand")
def test_mimic_by_hand():
    """Half the mean over two boxes, two channels and four bins, on the teacher's proposals."""
    # One cell a bin on constant maps: differences 1 (channel 0) and 3 (channel 1), so the mean of
    # the squares is (1 + 9) / 2 = 5 and Mimic's loss 2.5.
    theirs = torch.tensor([7.0, 7.0]).view(1, 2, 1, 1)
    ours = theirs + torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    maps = [
        {"p2": x.expand(1, 2, 16, 32).clone(), "p3": torch.full((1, 2, 8, 16), 50.0)}
        for x in (ours, theirs)
    ]
    maps[0]["p2"].requires_grad_()
    rows = torch.tensor([[8.0, 8, 40, 56], [40, 10, 60, 50]])
    proposals = Instances((64, 128), proposal_boxes=Boxes(rows))
    term = build_term("region", BOXES="teacher", REDUCTION="half_mean")
    loss = term(passed(maps[0]), passed(maps[1], proposals=[proposals]), NOTHING)
    assert loss.item() == pytest.approx(2.5, rel=1e-6)
    loss.backward()
    # Its slopes add up to d/d(shift of both channels): (1 + 3) / 2.
    assert maps[0]["p2"].grad.sum().item() == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("boxes", ["gt", "teacher"])
@pytest.mark.parametrize("normalize", ["none", "teacher_variance"])
def test_region_on_other_boxes_equals_pooling_by_torchvision(boxes, normalize):
    from torchvision.ops import roi_align

    g = torch.Generator().manual_seed(0)
    maps = {
        side: {
            "p2": torch.randn(1, 2, 16, 32, generator=g),
            "p3": torch.randn(1, 2, 8, 16, generator=g),
        }
        for side in "st"
    }
    # Both boxes are small, so both belong to the finest level, stride 4.
    rows = torch.tensor([[4.0, 4, 20, 40], [30, 10, 50, 60]])
    targets = Targets(boxes=[rows], ignore_boxes=[torch.zeros(0, 4)])
    proposals = Instances((64, 128), proposal_boxes=Boxes(torch.cat([rows, rows + 8])))
    term = build_term("region", BOXES=boxes, NORMALIZE=normalize, TEACHER_TOPK=2)
    found = term(passed(maps["s"]), passed(maps["t"], proposals=[proposals]), targets)
    pooled = [
        roi_align(maps[side]["p2"], [rows], 2, spatial_scale=0.25, sampling_ratio=0, aligned=True)
        for side in "st"
    ]
    expected = F.mse_loss(*pooled)
    if normalize != "none":
        expected = expected / pooled[1].var(correction=0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def sampled(classes, boxes=None, truth=None):
    n = len(classes)
    boxes = torch.tensor([[0.0, 0, 10, 20]]).repeat(n, 1) if boxes is None else boxes
    instances = Instances((64, 64), proposal_boxes=Boxes(boxes), gt_classes=torch.tensor(classes))
    if truth is not None:
        instances.gt_boxes = Boxes(truth)
    return [instances]


@rule("Weights are scale-free: a term is a mean, but for FGD and MGD, published as sums")
def test_logit_parts_by_composition():
    s, t = regions(4), regions(4, seed=1)
    rows = sampled([0, 1, 0, 1], truth=torch.tensor([[1.0, 2, 12, 25]]).repeat(4, 1))
    ours, theirs = passed({}, regions=s, sampled=rows), passed({}, regions=t)

    def value(*parts, **options):
        return build_term("logit", PARTS=list(parts), **options)(ours, theirs, NOTHING).item()

    hidden = F.mse_loss(s.hidden, t.hidden).item()
    predictions = 0.5 * (
        F.mse_loss(s.class_logits, t.class_logits) + F.mse_loss(s.deltas, t.deltas)
    )
    kl = 4 * F.kl_div(
        F.log_softmax(s.class_logits / 2, 1),
        F.softmax(t.class_logits / 2, 1),
        reduction="batchmean",
    )
    foreground = [0, 2]  # class 1 is the background of one class
    deltas = F.smooth_l1_loss(s.deltas[foreground], t.deltas[foreground], reduction="sum") / 4
    target = Box2BoxTransform(spec().delta_weights).get_deltas(
        rows[0].proposal_boxes.tensor[foreground], rows[0].gt_boxes.tensor[foreground]
    )
    es = (s.deltas[foreground] - target).square().sum(1)
    et = (t.deltas[foreground] - target).square().sum(1)
    bounded = es[es + 0.01 > et].sum() / 4
    assert value("hidden") == pytest.approx(hidden, rel=1e-6)
    assert value("predictions") == pytest.approx(predictions.item(), rel=1e-6)
    assert value("kl", TEMPERATURE=2.0) == pytest.approx(kl.item(), rel=1e-5)
    assert value("deltas") == pytest.approx(deltas.item(), rel=1e-6)
    assert 0 < bounded < es.sum() / 4  # one of the two is within the teacher's error
    assert value("bounded") == pytest.approx(bounded.item(), rel=1e-6)
    both = value("hidden", "deltas", PART_WEIGHTS=[2.0, 0.5])
    assert both == pytest.approx(2 * hidden + 0.5 * deltas.item(), rel=1e-6)


def test_deltas_are_brought_to_the_students_parametrisation():
    # The teacher's deltas are of weights (20, 20, 10, 10), twice the student's (10, 10, 5, 5).
    t = regions(1, seed=1)
    s = RegionOutputs([], t.pooled, t.hidden, t.class_logits, t.deltas / 2)
    ours, theirs = passed({}, regions=s, sampled=sampled([0])), passed({}, regions=t)
    teacher = spec(delta_weights=(20.0, 20.0, 10.0, 10.0))
    term = build_term("logit", teacher=teacher, PARTS=["deltas", "predictions"])
    assert term(ours, theirs, NOTHING).item() == pytest.approx(0, abs=1e-12)


def test_a_teacher_with_another_class_list():
    coco = spec(num_classes=80, class_agnostic_deltas=False)
    for name in ("pyramid", "region"):
        build_term(name, teacher=coco)
    build_term("logit", teacher=coco, PARTS=["hidden"])
    with pytest.raises(ValueError, match="1 classes and the teacher 80.*HKD.TEACHER.CLASS_MAP"):
        build_term("logit", teacher=coco)

    # person is class 0 of 80: logits 0 and 80 (background), deltas 0 to 3
    assert teacher_columns([0], spec(), coco) == ([0, 80], [0, 1, 2, 3])
    assert teacher_columns([2], spec(), coco) == ([2, 80], [8, 9, 10, 11])
    two = spec(num_classes=2, class_agnostic_deltas=False)
    assert teacher_columns([5, 1], two, coco)[1] == [20, 21, 22, 23, 4, 5, 6, 7]
    assert teacher_columns([], two, spec(num_classes=2))[1] == [0, 1, 2, 3, 0, 1, 2, 3]
    for class_map, sentence in [
        ([0, 1], "2 entries for 1 student"),
        ([80], "classes 0 to 79"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            teacher_columns(class_map, spec(), coco)
    with pytest.raises(ValueError, match="CLS_AGNOSTIC_BBOX_REG to False"):
        teacher_columns([0, 1], spec(num_classes=2), coco)


def test_class_map_picks_the_teachers_columns():
    t = regions(3, seed=1, classes=80, deltas=320)
    # A student that says of the person what the teacher says: logits 0 and background, deltas 0-3.
    s = RegionOutputs(
        [], t.pooled, t.hidden, t.class_logits[:, [7, 80]].clone(), t.deltas[:, 28:32].clone()
    )
    coco = spec(num_classes=80, class_agnostic_deltas=False)
    parts = ["predictions", "kl", "deltas"]
    term = build_term("logit", teacher=coco, class_map=[7], PARTS=parts)
    rows = sampled([0, 0, 1])
    ours, theirs = passed({}, regions=s, sampled=rows), passed({}, regions=t)
    assert term(ours, theirs, NOTHING).item() == pytest.approx(0, abs=1e-6)


@rule("Nothing to compare gives 0 with a gradient")
def test_no_boxes_give_zero_with_a_gradient():
    empty = regions(0)
    empty.pooled.requires_grad_()
    empty.hidden.requires_grad_()
    ours = passed({}, regions=empty, sampled=sampled([]))
    for term in (build_term("region"), build_term("logit")):
        loss = term(ours, passed({}, regions=regions(0)), NOTHING)
        assert loss.item() == 0
        loss.backward()


@pytest.mark.parametrize(
    "term, options, sentence",
    [
        ("pyramid", {"LEVELS": ["p2", "p9"]}, "names 'p9', which the student's backbone"),
        ("pyramid", {"LEVELS": []}, "HKD.PYRAMID.LEVELS is empty"),
        ("pyramid", {"DISTANCE": "l7"}, "HKD.PYRAMID.DISTANCE is 'l7'; choose from mse"),
        ("pyramid", {"MASK": "gt"}, "HKD.PYRAMID.MASK is 'gt'"),
        ("pyramid", {"NORMALIZE": "max"}, "HKD.PYRAMID.NORMALIZE is 'max'"),
        ("pyramid", {"ADAPTER": "3x3"}, "HKD.PYRAMID.ADAPTER is '3x3'; choose from auto, always"),
        ("pyramid", {"DISTANCE": "pkd", "MASK": "boxes"}, "set HKD.PYRAMID.MASK to none"),
        ("region", {"BOXES": "all"}, "HKD.REGION.BOXES is 'all'; choose from sampled"),
        ("region", {"REDUCTION": "sum"}, "REGION.REDUCTION is 'sum'; choose from mean, half_mean"),
        ("region", {"TEACHER_TOPK": 0}, "HKD.REGION.TEACHER_TOPK is 0"),
        ("logit", {"PARTS": ["kl", "mse"]}, "choose from hidden, predictions"),
        ("logit", {"PARTS": []}, "HKD.LOGIT.PARTS"),
        ("logit", {"PARTS": ["kl", "kl"]}, "name each part once"),
        ("logit", {"PART_WEIGHTS": [1.0]}, "1 entries for 2 parts"),
        ("logit", {"TEMPERATURE": 0.0}, "HKD.LOGIT.TEMPERATURE is 0.0"),
    ],
)
def test_wrong_options(term, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_term(term, **options)


@rule("What cannot work stops the run before its first step, with one sentence")
def test_pairs_that_do_not_fit():
    with pytest.raises(ValueError, match="level 'p3' has stride 8, which no level of the teacher"):
        build_term("pyramid", teacher=spec((4, 16)))
    with pytest.raises(ValueError, match="student pools 2x2 bins, the teacher 7x7"):
        build_term("region", teacher=spec(pooler_resolution=7))
    with pytest.raises(ValueError, match=r"strides \[4.0, 8.0\], the teacher from \[4.0, 16.0\]"):
        build_term("region", teacher=spec((4, 16)))


def test_unknown_and_repeated_terms():
    cfg = small_config()
    cfg.HKD.TERMS = ["pyramids"]
    with pytest.raises(ValueError, match="'pyramids', which is not .* choose from .*pyramid"):
        build_terms(cfg, spec(), spec())
    cfg.HKD.TERMS = ["region", "region"]
    with pytest.raises(ValueError, match="names 'region' twice"):
        build_terms(cfg, spec(), spec())
