"""feature_imitation_loss and rasterize_boxes against numbers worked out by hand, and gradients."""

import pytest
import torch
from torch.autograd import gradcheck

from hkd_d2.ops import assign_boxes_to_levels, feature_imitation_loss, rasterize_boxes

STRIDES = [4.0, 8.0]
# The teacher is 0, so the student's values are the differences. Two channels, levels 2x2 and 1x1.
#   level 0, channel 0: 1 2   channel 1: 0 1   mean of squares a cell: 0.5 2.5
#                       3 4              0 1                           4.5 8.5
#   level 1: (1, 3), mean of squares 5
STUDENT = [
    torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]]),
    torch.tensor([[[[1.0]], [[3.0]]]]),
]
TEACHER = [torch.zeros_like(s) for s in STUDENT]
# Columns 1 to ceil(7/4) = 2, rows 0 to ceil(5/4) = 2: cells (0, 1) and (1, 1) of level 0.
BOX = [torch.tensor([[4.0, 0.0, 7.0, 5.0]])]
# Cells (0, 0) and (0, 1) of level 0.
IGNORE = [torch.tensor([[0.0, 0.0, 8.0, 4.0]])]


def random_pyramids(channels=(3, 3), dtype=torch.float64, images=2, sizes=((5, 7), (3, 4))):
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(images, c, h, w, generator=generator, dtype=dtype) for h, w in sizes]
        for c in channels
    ]


@pytest.mark.parametrize(
    "distance, expected",
    [
        # level 0: (1+4+9+16+0+1+0+1)/8 = 4, level 1: (1+9)/2 = 5
        ("mse", 4.5),
        # level 0: 12/8 = 1.5, level 1: 4/2 = 2
        ("l1", 1.75),
        # level 0: (0.5+1.5+2.5+3.5+0+0.5+0+0.5)/8 = 1.125, level 1: (0.5+2.5)/2 = 1.5
        ("smooth_l1", 1.3125),
    ],
)
def test_whole_maps_by_hand(distance, expected):
    loss = feature_imitation_loss(STUDENT, TEACHER, distance=distance)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "options, expected",
    [
        # level 0: (2.5+8.5)/2 = 5.5; no box on level 1: 0
        ({"boxes": BOX}, 2.75),
        # level 1: columns floor(4/8) = 0 to 1: its only cell, 5
        ({"boxes": BOX, "assign": "all"}, 5.25),
        # level 0: (2.5+8.5 + 0.5 (0.5+4.5)) / (2 + 1) = 4.5, level 1: all background, 5
        ({"boxes": BOX, "background_weight": 0.5}, 4.75),
        # level 0: (4 (2.5+8.5) + 0.5+4.5) / (8 + 2) = 4.9
        ({"boxes": BOX, "background_weight": 1.0, "foreground_weight": 4.0}, 4.95),
        # (0, 0) is ignored only: (2.5+8.5 + 0.5 * 4.5) / 2.5 = 5.3; (0, 1) stays foreground
        ({"boxes": BOX, "ignore_boxes": IGNORE, "background_weight": 0.5}, 5.15),
        # the region hides the only cell of level 1 too: (5.3 + 0) / 2
        (
            {
                "boxes": BOX,
                "ignore_boxes": IGNORE,
                "background_weight": 0.5,
                "assign_ignore": "all",
            },
            2.65,
        ),
        # without boxes all cells but the ignored: (4.5+8.5)/2 = 6.5
        ({"ignore_boxes": IGNORE}, 5.75),
        # nothing counts
        ({"boxes": [torch.zeros(0, 4)]}, 0.0),
        ({"background_weight": 0.0}, 0.0),
        # whole maps: (0.25 * 4 + 2 * 5) / 2
        ({"level_weights": [0.25, 2.0]}, 5.5),
        ({"level_weights": torch.tensor([0.25, 2.0])}, 5.5),
    ],
)
def test_masks_by_hand(options, expected):
    loss = feature_imitation_loss(STUDENT, TEACHER, strides=STRIDES, **options)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_cosine_by_hand():
    # (3, 4) against (4, 3): cos = 24 / 25; against (-3, -4): cos = -1; mean of 0.04 and 2
    student = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    teacher = torch.tensor([[4.0, -3.0], [3.0, -4.0]]).view(1, 2, 1, 2)
    loss = feature_imitation_loss([student], [teacher], distance="cosine")
    assert loss.item() == pytest.approx(1.02, abs=1e-6)


def test_pkd_is_one_minus_the_correlation():
    student, teacher = random_pyramids(sizes=((9, 11),))
    s, t = (x[0].transpose(0, 1).flatten(1) for x in (student, teacher))
    pairs = zip(s, t, strict=True)
    correlation = torch.stack([torch.corrcoef(torch.stack(c))[0, 1] for c in pairs]).mean()
    n = s.shape[1]
    loss = feature_imitation_loss(student, teacher, distance="pkd")
    assert loss.item() == pytest.approx((1 - correlation.item()) * (n - 1) / n, abs=1e-5)
    # A channel that is constant has no deviation, and a cell alone neither.
    constant = [torch.ones(1, 2, 3, 3, requires_grad=True)]
    feature_imitation_loss(constant, [torch.randn(1, 2, 3, 3)], distance="pkd").backward()
    assert constant[0].grad.isfinite().all()
    one = [torch.ones(1, 2, 1, 1)]
    assert feature_imitation_loss(one, [2 * one[0]], distance="pkd").item() == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("distance", ["mse", "l1", "smooth_l1", "cosine", "pkd"])
def test_gradients(distance, masked):
    if masked and distance == "pkd":
        pytest.skip("pkd takes whole maps only")
    student, teacher = random_pyramids(channels=(2, 3))
    weights = [torch.randn(3, 2, dtype=torch.float64) for _ in student]
    biases = [torch.randn(3, dtype=torch.float64), None]
    leaves = [x.requires_grad_() for x in [*student, *weights, biases[0]]]
    options = {}
    if masked:
        boxes = [torch.tensor([[1.0, 2.0, 13.0, 9.0], [0.0, 0.0, 300.0, 300.0]]), torch.zeros(0, 4)]
        options = {"boxes": boxes, "strides": STRIDES, "background_weight": 0.3}

    def loss(*_):
        return feature_imitation_loss(
            student,
            teacher,
            distance=distance,
            adapter=list(zip(weights, biases, strict=True)),
            level_weights=[0.7, 1.3],
            **options,
        )

    assert loss().item() > 0
    assert gradcheck(loss, leaves)


def test_an_adapter_before_or_inside_the_loss_is_the_same():
    student, teacher = random_pyramids(channels=(2, 3))
    weight, bias = torch.randn(3, 2).double(), torch.randn(3).double()
    adapted = [torch.einsum("tc,nchw->nthw", weight, s) + bias.view(-1, 1, 1) for s in student]
    boxes = [torch.tensor([[1.0, 2.0, 13.0, 9.0]])] * 2
    for options in ({}, {"boxes": boxes, "strides": STRIDES}):
        inside = feature_imitation_loss(student, teacher, adapter=(weight, bias), **options)
        before = feature_imitation_loss(adapted, teacher, **options)
        torch.testing.assert_close(inside, before, atol=1e-12, rtol=0)


def test_a_nan_outside_the_mask_is_harmless_and_one_inside_is_seen():
    student = [s.clone() for s in STUDENT]
    student[0][0, 0, 0, 0] = float("nan")
    student[0].requires_grad_()
    loss = feature_imitation_loss(student, TEACHER, boxes=BOX, strides=STRIDES)
    loss.backward()
    assert loss.item() == pytest.approx(2.75)
    assert student[0].grad.isfinite().all()
    assert feature_imitation_loss(student, TEACHER).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    student, teacher = random_pyramids(dtype=torch.float32)
    student = [s.to(dtype).to(memory_format=torch.channels_last).requires_grad_() for s in student]
    loss = feature_imitation_loss(student, teacher)
    exact = feature_imitation_loss([s.double() for s in student], [t.double() for t in teacher])
    assert loss.dtype == torch.float32 and exact.dtype == torch.float64
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    loss.backward()
    assert student[0].grad.dtype == dtype


def test_autocast_does_not_round_the_adapter():
    student, teacher = random_pyramids(channels=(2, 3))
    weight = torch.randn(3, 2, dtype=torch.float64)
    exact = feature_imitation_loss(student, teacher, adapter=(weight, None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = feature_imitation_loss(
            [s.float() for s in student], teacher, adapter=(weight.float(), None)
        )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_only_the_student_and_the_adapter_get_gradients():
    student, teacher = ([x.requires_grad_() for x in p] for p in random_pyramids())
    boxes = [torch.tensor([[1.0, 2.0, 13.0, 9.0]], requires_grad=True)] * 2
    feature_imitation_loss(student, teacher, boxes=boxes, strides=STRIDES).backward()
    assert student[0].grad.abs().sum() > 0
    assert teacher[0].grad is None and boxes[0].grad is None


@pytest.mark.parametrize("size", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_nothing_to_compare_gives_zero_with_a_graph(size):
    student = [torch.zeros(size, requires_grad=True)]
    for options in ({}, {"boxes": [torch.zeros(0, 4)] * size[0], "strides": [4.0]}):
        loss = feature_imitation_loss(student, [torch.zeros(size)], **options)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.shape == size


def cells(mask):
    return [tuple(c) for c in mask.nonzero().tolist()]


@pytest.mark.parametrize(
    "rule, expected",
    [
        # x 5..13 at stride 4: floor(1.25) = 1 to ceil(3.25) = 4; y 2..3: 0 to 1
        ("cells", [(0, 1), (0, 2), (0, 3)]),
        # 1 to floor(3.25) = 3; y: floor(0.75) = 0, at least one cell
        ("defeat", [(0, 1), (0, 2)]),
        # 1 to ceil(3.25) + 1 = 5; y: 0 to 2
        ("fgd", [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4)]),
    ],
)
def test_rasterize_rules_by_hand(rule, expected):
    mask = rasterize_boxes(torch.tensor([[5.0, 2.0, 13.0, 3.0]]), (3, 6), 4.0, rule=rule)
    assert cells(mask) == expected


def test_rasterize_at_the_edges():
    def covered(*box):
        return cells(rasterize_boxes(torch.tensor([box]), (2, 3), 4.0))

    assert covered(4.0, 4.0, 8.0, 8.0) == [(1, 1)]  # exactly one cell
    assert covered(4.0, 4.0, 4.0, 4.0) == [(1, 1)]  # no area: still one cell
    assert covered(-9.0, -9.0, 2.0, 2.0) == [(0, 0)]  # clipped
    assert covered(-9.0, -9.0, -5.0, -5.0) == []  # outside
    assert covered(float("nan"), 0.0, 8.0, 8.0) == []
    assert len(covered(-1e9, -1e9, 1e9, 1e9)) == 6
    assert rasterize_boxes(torch.zeros(0, 4), (2, 3), 4.0).sum() == 0


def test_levels_are_detectron2s():
    poolers = pytest.importorskip("detectron2.modeling.poolers")
    structures = pytest.importorskip("detectron2.structures")
    generator = torch.Generator().manual_seed(1)
    size = torch.exp(torch.rand(500, 2, generator=generator) * 9 - 1)
    corner = torch.rand(500, 2, generator=generator) * 1000
    boxes = torch.cat([corner, corner + size], 1)
    boxes = torch.cat([boxes, torch.tensor([[0.0, 0, 112, 112], [0, 0, 224, 224], [5, 5, 5, 5]])])
    expected = poolers.assign_boxes_to_levels([structures.Boxes(boxes)], 2, 5, 224, 4)
    levels = assign_boxes_to_levels(boxes, [4, 8, 16, 32])
    assert levels.tolist() == expected.tolist()
    assert set(levels.tolist()) == {0, 1, 2, 3}
    # With a gap in the strides a box goes to the coarsest level that is not above its own.
    assert assign_boxes_to_levels(boxes, [4, 16]).tolist() == (expected >= 2).long().tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student": STUDENT[:1]}, "student has 1 levels and teacher has 2"),
        ({"student": STUDENT[0]}, "student must be a non-empty list"),
        (
            {"teacher": [TEACHER[0], TEACHER[1].expand(1, 2, 2, 2)]},
            r"student\[1\] is \(1, 2, 1, 1\)",
        ),
        ({"teacher": [torch.zeros(1, 3, 2, 2), TEACHER[1]]}, "pass adapter=.* shape \\(3, 2\\)"),
        ({"adapter": (torch.zeros(2, 3), None)}, "adapter's weight of level 0 is \\(2, 3\\)"),
        ({"adapter": [(torch.zeros(2, 2), None)]}, "adapter has 1 entries for 2 levels"),
        ({"boxes": BOX}, "strides is missing"),
        ({"boxes": BOX, "strides": [4.0]}, "strides has 1 entries for 2 levels"),
        ({"boxes": BOX, "strides": [8.0, 4.0]}, "finest level first"),
        ({"boxes": BOX * 2, "strides": STRIDES}, "boxes has 2 entries for 1 images"),
        ({"boxes": [BOX[0].half()], "strides": STRIDES}, r"boxes\[0\] is torch.float16"),
        ({"boxes": [BOX[0][:, :3]], "strides": STRIDES}, r"boxes\[0\] is \(1, 3\)"),
        ({"distance": "l2"}, "distance is 'l2'; choose from mse"),
        ({"assign": "none"}, "assign is 'none'"),
        ({"rasterize": "anchors"}, "rasterize is 'anchors'"),
        ({"foreground_weight": -1.0}, "foreground_weight is -1.0"),
        ({"level_weights": [1.0]}, "level_weights has 1 entries"),
        ({"distance": "pkd", "boxes": BOX, "strides": STRIDES}, "standardises whole maps"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        feature_imitation_loss(**{"student": STUDENT, "teacher": TEACHER, **change})


def test_compiles_without_a_graph_break():
    student, teacher = random_pyramids()
    compiled = torch.compile(feature_imitation_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), feature_imitation_loss(student, teacher))
