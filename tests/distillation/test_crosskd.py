"""The CrossKD term: numbers by hand, the tap, the way through the teacher's head, refusals."""

from math import log

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from helpers.rules import rule
from helpers.small_detectors import make_batch, one_stage_config, save_teacher
from helpers.small_maps import NOTHING, build_term, dense_spec, one_stage_spec, passed
from hkd_d2.distillation.crosskd import align_statistics
from hkd_d2.distillation.detector_pass import DenseOutputs
from hkd_d2.distillation.term import reused_convs
from hkd_d2.modeling import one_stage


def kind_of(head="RetinaNet", towers=(2, 2), strides=(8, 16), **fields):
    dense = dense_spec(head, strides, offset=0.5, towers=list(towers) if towers else None)
    return one_stage_spec(head, strides, dense, **fields)


def crosskd(student=None, teacher=..., **options):
    return build_term("crosskd", student or kind_of(), teacher, **options)


def head_outputs(probabilities, deltas, anchors):
    """One image, levels of two anchors and one, one class."""
    p = torch.tensor(probabilities, dtype=torch.float64)[None, :, None]
    x, d = (p / (1 - p)).log(), torch.tensor(deltas)[None]
    anchors = torch.tensor(anchors)
    return DenseOutputs(
        logits=[x[:, :2], x[:, 2:]],
        deltas=[d[:, :2], d[:, 2:]],
        anchors=[Boxes(anchors[:2]), Boxes(anchors[2:])],
    )


def taps(seed, channels=2):
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(1, channels, 1, n, generator=g) for _ in range(2)) for n in (2, 1)]


ANCHORS = [[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 40, 40]]


@pytest.mark.parametrize("box_loss", ["giou", "iou"])
def test_by_hand(box_loss):
    """Anchors 0 and 1 are objects', anchor 2 has no label and the most extreme values."""
    # dx moves an anchor by that share of its width.
    none = [0.0] * 4
    teacher = head_outputs([0.75, 0.25, 0.999], [none, none, none], ANCHORS)
    cross = head_outputs(
        [0.5, 2 / 3, 0.001], [[0.5, 0, 0, 0], [2.0, 0, 0, 0], [9.0, 0, 0, 0]], ANCHORS
    )
    student = head_outputs([0.5, 0.5, 0.5], [none, none, none], ANCHORS)
    student.labels = [torch.tensor([0, 0, -1])]
    student.taps, teacher.taps = taps(0), taps(1)
    teacher.resume = lambda given: cross
    # |1/2 - 3/4| ln 2 + |2/3 - 1/4| (1/4 ln 3/2 + 3/4 ln 3), by two objects
    classes = (0.25 * 0.693147 + 0.416667 * 0.925325) / 2
    if box_loss == "giou":
        # 0: IoU 1/3 and no more in the hull, so 2/3. 1: a gap of one box, GIoU -1/3, so 4/3.
        boxes = (0.75 * 2 / 3 + 0.25 * 4 / 3) / 2
    else:
        boxes = (0.75 * log(3) + 0.25 * log(1e6)) / 2
    options = {"CLASS_WEIGHT": 0.4, "BOX_WEIGHT": 0.75, "BOX_LOSS": box_loss}
    loss = crosskd(**options)(passed(dense=student), passed(dense=teacher), NOTHING)
    assert loss.item() == pytest.approx(0.4 * classes + 0.75 * boxes, rel=2e-6)
    # The exponent beta: 2 squares the distances in probability.
    classes = (0.25**2 * 0.693147 + 0.416667**2 * 0.925325) / 2
    loss = crosskd(BETA=2.0, BOX_WEIGHT=0.0)(passed(dense=student), passed(dense=teacher), NOTHING)
    assert loss.item() == pytest.approx(classes, rel=2e-6)


def test_fcos_divides_by_the_centerness():
    """Distances to the sides in strides; centerness sqrt(1/4) and 1, so Z is 1.5."""
    anchors = [[-5.0, -5, 5, 5], [5, -5, 15, 5], [-10, -10, 10, 10]]
    sides = [[1.0] * 4] * 3
    teacher = head_outputs([0.75, 0.25, 0.25], sides, anchors)
    cross = head_outputs([0.5, 2 / 3, 0.25], [[1.0, 1, 1, 0.5]] + sides[1:], anchors)
    student = head_outputs([0.5] * 3, sides, anchors)
    student.labels = [torch.tensor([0, 0, 1])]
    # Centre (0, 0): l 2, r 8, t 5, b 5. Centre (10, 0): 5 on every side.
    truth = [[-2.0, -5, 8, 5], [5, -5, 15, 5], [0, 0, 1, 1]]
    student.matched_boxes = [torch.tensor(truth)]
    student.taps, teacher.taps = taps(0), taps(1)
    teacher.resume = lambda given: cross
    loss = crosskd(kind_of("FCOS"), BOX_LOSS="iou")(
        passed(dense=student), passed(dense=teacher), NOTHING
    )
    # Box 0 of the cross-head ends at 5 instead of 10: 3/4 of the teacher's.
    expected = 0.25 * 0.693147 + 0.416667 * 0.925325 + 0.75 * log(4 / 3)
    assert loss.item() == pytest.approx(expected / 1.5, rel=2e-6)


def test_channels_get_the_teachers_statistics():
    # Channel 0: (1, 3) has mean 2 and deviation sqrt 2, (10, 30) 20 and 10 sqrt 2; channel 1: the
    # order stays the student's.
    values = torch.tensor([[[[1.0, 3.0]], [[5.0, -5.0]]]], requires_grad=True)
    model = torch.tensor([[[[10.0, 30.0]], [[0.0, 2.0]]]])
    found = align_statistics(values, model)
    assert torch.allclose(found, torch.tensor([[[[10.0, 30.0]], [[2.0, 0.0]]]]), atol=1e-4)
    # A map of one value has no deviation: it gets the teacher's mean, and a slope of 0.
    one = torch.tensor([[[[3.0]]]], requires_grad=True)
    found = align_statistics(one, torch.tensor([[[[7.0]]]]))
    found.sum().backward()
    assert found.item() == 7 and one.grad.item() == 0


def test_nothing_labelled_gives_zero_with_a_gradient():
    none = [[0.0] * 4] * 3
    student, teacher = (head_outputs([0.5] * 3, none, ANCHORS) for _ in range(2))
    student.labels = [torch.full((3,), -1)]
    student.taps, teacher.taps = taps(0), taps(1, channels=3)
    term = crosskd(teacher=kind_of(towers=(2, 3)), REUSED_CONVS=0)

    def resume(given):
        logits = [sum(x.sum() for x in pair) * torch.ones(1, n, 1) for pair, n in
                  zip(given, (2, 1), strict=True)]  # fmt: skip
        return DenseOutputs(logits, [x * torch.ones(4) for x in logits], teacher.anchors)

    teacher.resume = resume
    loss = term(passed(dense=student), passed(dense=teacher), NOTHING)
    loss.backward()
    assert loss.item() == 0 and len(list(term.parameters())) == 4
    assert all((p.grad == 0).all() for p in term.parameters())


@pytest.fixture(params=["RetinaNet", "FCOS"])
def pair(request, tmp_path, build):
    """A function that builds a student beside a wider teacher, both with towers of two."""

    def make(reused, norm="", precision="fp32"):
        configs = [one_stage_config(request.param, *size) for size in ((16, 0.25), (32, 0.5))]
        for cfg in configs:
            cfg.MODEL.RETINANET.NUM_CONVS, cfg.MODEL.RETINANET.NORM = 2, norm
        cfg = configs[0]
        cfg.MODEL.META_ARCHITECTURE, cfg.HKD.TERMS = "HKDDetector", ["crosskd"]
        cfg.HKD.CROSSKD.REUSED_CONVS, cfg.HKD.TEACHER.PRECISION = reused, precision
        cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = save_teacher(configs[1], tmp_path)
        return build(cfg)

    return make


def passes_of(model):
    seen = {}
    forward = model.terms["crosskd"].forward

    def spy(student, teacher, targets):
        seen.update(student=student, teacher=teacher)
        return forward(student, teacher, targets)

    model.terms["crosskd"].forward = spy
    with EventStorage(0):
        losses = model(make_batch())
    return seen["student"], seen["teacher"], losses


@rule("CrossKD's gradient passes the teacher's frozen head into the student's first layers")
@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("reused", [0, 1, 2])
def test_the_tap_and_the_way_on(pair, reused, norm):
    """The tap is before the activation; from there on the teacher's head gives what it gave."""
    model = pair(reused, norm)
    head = model.teacher.model.head
    for module in head.modules():  # a batch norm a level: each level has its own statistics
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    student, teacher, _ = passes_of(model)
    maps = [teacher.features[name] for name in model.teacher.model.head_in_features]
    assert student.dense.resume is None
    assert [x.shape[1] for x, _ in student.dense.taps] == [16] * 5
    for i, subnet in enumerate((head.cls_subnet, head.bbox_subnet)):
        modules = list(subnet)  # convolution, norm if any, activation; twice
        assert len(modules) == (6 if norm else 4)
        last = {2: 0, 1: len(modules) // 2 - 1, 0: len(modules) - 1}[reused]
        for x, tap in zip(maps, teacher.dense.taps, strict=True):
            with torch.no_grad():
                for module in modules[:last]:
                    x = module(x)
            assert torch.equal(tap[i], x)
    # Detectron2's own forward of the head, and the teacher's head resumed at its own tap.
    with torch.no_grad():
        plain = one_stage.dense_stage(model.teacher.model, teacher.features)
    again = teacher.dense.resume(teacher.dense.taps)
    for dense in (teacher.dense, again):
        for name in ("logits", "deltas", "centerness"):
            ours, theirs = (getattr(x, name) or [] for x in (dense, plain))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@rule("CrossKD's gradient passes the teacher's frozen head into the student's first layers")
def test_gradient_goes_through_the_teachers_head_into_the_students_first_layers(pair):
    model = pair(1)
    teacher = model.teacher.model
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    theirs = {id(p) for p in teacher.parameters()}
    _, _, losses = passes_of(model)
    losses["loss_hkd_crosskd"].backward()
    head = model.student.head
    for subnet in (head.cls_subnet, head.bbox_subnet):  # conv, relu, conv, relu
        assert subnet[0].weight.grad.abs().sum() > 0
        assert subnet[2].weight.grad is None  # the student's last layers are the ground truth's
    assert head.cls_score.weight.grad is None and head.bbox_pred.weight.grad is None
    assert all(p.grad.abs().sum() > 0 for n, p in model.terms.named_parameters() if "weight" in n)
    assert next(model.student.backbone.parameters()).grad.abs().sum() > 0
    # The teacher stays a guest.
    assert not theirs & {id(p) for p in model.parameters()}
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(m.training for m in teacher.modules())


def test_a_teacher_in_half_precision(pair):
    found = [passes_of(pair(1, precision=p))[2]["loss_hkd_crosskd"] for p in ("fp32", "bf16")]
    assert found[1].dtype == torch.float32
    assert found[1].item() == pytest.approx(found[0].item(), rel=0.05)


def test_a_twin_has_nothing_to_learn(tmp_path, build):
    cfg = one_stage_config("RetinaNet")
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = save_teacher(cfg, tmp_path)
    cfg.MODEL.META_ARCHITECTURE, cfg.HKD.TERMS = "HKDDetector", ["crosskd"]
    model = build(cfg)
    other = passes_of(model)[2]["loss_hkd_crosskd"].item()
    model.student.load_state_dict(model.teacher.model.state_dict())
    assert passes_of(model)[2]["loss_hkd_crosskd"].item() < 1e-4 * other


def test_needs_name_the_tap():
    assert reused_convs(crosskd(REUSED_CONVS=1).needs) == 1
    assert reused_convs(crosskd(REUSED_CONVS=0).needs) == 0
    assert reused_convs(frozenset({"features", "dense"})) is None


@rule("Dense heads are compared on the same anchors or refused")
@pytest.mark.parametrize(
    "teacher, options, sentence",
    [
        (kind_of(), {"BOX_LOSS": "l1"}, "HKD.CROSSKD.BOX_LOSS is 'l1'; choose from giou, iou"),
        (kind_of(), {"BETA": 0.5}, "HKD.CROSSKD.BETA is 0.5; give at least 1"),
        (kind_of(), {"CLASS_WEIGHT": -1.0}, "HKD.CROSSKD.CLASS_WEIGHT is -1.0; give at least 0"),
        (kind_of(), {"REUSED_CONVS": 2}, "REUSED_CONVS is 2, and the shorter tower has 1 conv"),
        (kind_of(), {"ADAPTER": "3x3"}, "HKD.CROSSKD.ADAPTER is '3x3'"),
        (kind_of(one_stage=False), {}, "needs the towers of a RetinaNet or an FCOS in both"),
        (kind_of("FCOS"), {}, "one of RetinaNet, the teacher one of FCOS"),
        (kind_of(strides=(16, 32)), {}, "compares both networks anchor by anchor"),
        (kind_of(towers=None), {}, "knows Detectron2's RetinaNetHead and FCOSHead"),
        (kind_of(num_classes=3), {}, "1 classes and the teacher 3.*or drop 'crosskd'"),
    ],
)
def test_what_is_refused(teacher, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        crosskd(teacher=teacher, **options)
