"""feature_imitation_loss: by hand, gradients, and the fused operator against the reference."""

import functools
import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.comparisons import OperatorCalls, assert_same_for_any_number_of_threads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import hkd_d2._C  # noqa: F401  the suite fails where the compiled module is missing
from helpers.rules import rule
from hkd_d2 import ops
from hkd_d2.ops import _library, assign_boxes_to_levels, rasterize_boxes, reference

IMPLS = ["fused", "reference"]
DISTANCES = ["mse", "l1", "smooth_l1", "cosine", "pkd"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
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


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture
def feature_imitation_loss(impl):
    """Every test below runs with the fused operator and with the reference, by name."""
    return functools.partial(ops.feature_imitation_loss, impl=impl)


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
def test_whole_maps_by_hand(feature_imitation_loss, distance, expected):
    loss = feature_imitation_loss(STUDENT, TEACHER, distance=distance)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "options, expected",
    [
        # level 0: (2.5+8.5)/2 = 5.5; no box on level 1: 0
        ({"boxes": BOX}, 2.75),
        # a box of 128 pixels belongs to level 1, whose only cell it covers: (5.5 + 5) / 2
        ({"boxes": [torch.cat([BOX[0], torch.tensor([[-120.0, -120, 8, 8]])])]}, 5.25),
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
        # 1 over 2x1 cells for column 1; 1 over 1x1 where the second box covers (0, 1) alone:
        # level 0: (1 * 2.5 + 0.5 * 8.5 + 0.5 (0.5+4.5)) / (1 + 0.5 + 2 * 0.5), level 1: 5
        (
            {
                "boxes": [torch.tensor([[4.0, 0, 7, 5], [4.0, 0, 8, 4]])],
                "box_weights": "area",
                "background_weight": 0.5,
            },
            (9.25 / 2.5 + 5) / 2,
        ),
        # the area is that of the whole box, 3x2 cells, of which 2x1 lie on the map; twice that
        (
            {
                "boxes": [torch.tensor([[4.0, 0, 12, 12]])],
                "box_weights": "area",
                "foreground_weight": 2.0,
                "background_weight": 1.0,
            },
            ((2.5 + 8.5) / 3 + 0.5 + 4.5) / (2 + 2 / 3) / 2 + 2.5,
        ),
        # (3 * 0.5 + 1 * 4.5) / 4 on level 0, 2 * 5 / 1 on level 1
        (
            {
                "spatial_weights": [torch.tensor([[[3.0, 0], [1, 0]]]), torch.tensor([[[2.0]]])],
            },
            (6 / 4 + 10) / 2,
        ),
        # the mask divides, not the attention: (2 * 2.5 + 1 * 8.5) / 2
        (
            {
                "boxes": BOX,
                "spatial_weights": [torch.tensor([[[9.0, 2], [9, 1]]]), torch.tensor([[[2.0]]])],
            },
            13.5 / 2 / 2,
        ),
        # channel 0 of level 0 twice, channel 1 not at all: 2 (1+4+9+16) / 8; level 1: (1+2*9) / 2
        (
            {"channel_weights": [torch.tensor([[2.0, 0]]), torch.tensor([[1.0, 2]])]},
            (7.5 + 9.5) / 2,
        ),
        # whole maps: (0.25 * 4 + 2 * 5) / 2
        ({"level_weights": [0.25, 2.0]}, 5.5),
        ({"level_weights": torch.tensor([0.25, 2.0])}, 5.5),
    ],
)
def test_masks_by_hand(feature_imitation_loss, options, expected):
    loss = feature_imitation_loss(STUDENT, TEACHER, strides=STRIDES, **options)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_cosine_by_hand(feature_imitation_loss):
    # (3, 4) against (4, 3): cos = 24 / 25; against (-3, -4): cos = -1; mean of 0.04 and 2
    student = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    teacher = torch.tensor([[4.0, -3.0], [3.0, -4.0]]).view(1, 2, 1, 2)
    loss = feature_imitation_loss([student], [teacher], distance="cosine")
    assert loss.item() == pytest.approx(1.02, abs=1e-6)


def test_pkd_is_one_minus_the_correlation(feature_imitation_loss):
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
def test_gradients(feature_imitation_loss, distance, masked):
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


def test_an_adapter_before_or_inside_the_loss_is_the_same(feature_imitation_loss):
    student, teacher = random_pyramids(channels=(2, 3))
    weight, bias = torch.randn(3, 2).double(), torch.randn(3).double()
    adapted = [torch.einsum("tc,nchw->nthw", weight, s) + bias.view(-1, 1, 1) for s in student]
    boxes = [torch.tensor([[1.0, 2.0, 13.0, 9.0]])] * 2
    for options in ({}, {"boxes": boxes, "strides": STRIDES}):
        inside = feature_imitation_loss(student, teacher, adapter=(weight, bias), **options)
        before = feature_imitation_loss(adapted, teacher, **options)
        torch.testing.assert_close(inside, before, atol=1e-12, rtol=0)


def test_a_nan_outside_the_mask_is_harmless_and_one_inside_is_seen(feature_imitation_loss):
    student = [s.clone() for s in STUDENT]
    student[0][0, 0, 0, 0] = float("nan")
    student[0].requires_grad_()
    loss = feature_imitation_loss(student, TEACHER, boxes=BOX, strides=STRIDES)
    loss.backward()
    assert loss.item() == pytest.approx(2.75)
    assert student[0].grad.isfinite().all()
    assert feature_imitation_loss(student, TEACHER).isnan()


@rule("Boxes stay float32 and losses are summed in float32, under autocast too")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(feature_imitation_loss, dtype):
    student, teacher = random_pyramids(dtype=torch.float32)
    student = [s.to(dtype).to(memory_format=torch.channels_last).requires_grad_() for s in student]
    loss = feature_imitation_loss(student, teacher)
    exact = feature_imitation_loss([s.double() for s in student], [t.double() for t in teacher])
    assert loss.dtype == torch.float32 and exact.dtype == torch.float64
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    loss.backward()
    assert student[0].grad.dtype == dtype


@rule("Boxes stay float32 and losses are summed in float32, under autocast too")
def test_autocast_does_not_round_the_adapter(feature_imitation_loss):
    student, teacher = random_pyramids(channels=(2, 3))
    weight = torch.randn(3, 2, dtype=torch.float64)
    exact = feature_imitation_loss(student, teacher, adapter=(weight, None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = feature_imitation_loss(
            [s.float() for s in student], teacher, adapter=(weight.float(), None)
        )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_only_the_student_and_the_adapter_get_gradients(feature_imitation_loss):
    student, teacher = ([x.requires_grad_() for x in p] for p in random_pyramids())
    boxes = [torch.tensor([[1.0, 2.0, 13.0, 9.0]], requires_grad=True)] * 2
    feature_imitation_loss(student, teacher, boxes=boxes, strides=STRIDES).backward()
    assert student[0].grad.abs().sum() > 0
    assert teacher[0].grad is None and boxes[0].grad is None


@pytest.mark.parametrize("size", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_nothing_to_compare_gives_zero_with_a_graph(feature_imitation_loss, size):
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
    Boxes = pytest.importorskip("detectron2.structures").Boxes
    generator = torch.Generator().manual_seed(1)
    size = torch.exp(torch.rand(500, 2, generator=generator) * 9 - 1)
    corner = torch.rand(500, 2, generator=generator) * 1000
    boxes = torch.cat([corner, corner + size], 1)
    boxes = torch.cat([boxes, torch.tensor([[0.0, 0, 112, 112], [0, 0, 224, 224], [5, 5, 5, 5]])])
    expected = poolers.assign_boxes_to_levels([Boxes(boxes)], 2, 5, 224, 4)
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
        ({"assign_ignore": "none"}, "assign_ignore is 'none'"),
        ({"rasterize": "anchors"}, "rasterize is 'anchors'"),
        ({"foreground_weight": -1.0}, "foreground_weight is -1.0"),
        ({"level_weights": [1.0]}, r"level_weights has the shape \(1,\) for 2 levels"),
        ({"level_weights": torch.ones(2, 1)}, r"level_weights has the shape \(2, 1\)"),
        ({"distance": "pkd", "boxes": BOX, "strides": STRIDES}, "standardises whole maps"),
        ({"box_weights": "size"}, "box_weights is 'size'"),
        ({"rasterize": "fgfi"}, "anchors is missing"),
        ({"rasterize": "fgfi", "anchors": [torch.ones(1, 2)]}, "each of 2 levels"),
        ({"rasterize": "fgfi", "anchors": [torch.ones(2)] * 2}, r"anchors\[0\] is \(2,\)"),
        (
            {"rasterize": "fgfi", "anchors": [torch.ones(1, 2)] * 2, "anchor_threshold": 1.0},
            "anchor_threshold is 1.0",
        ),
        (
            {"rasterize": "fgfi", "anchors": [torch.ones(1, 2)] * 2, "box_weights": "area"},
            "covers no rectangle",
        ),
        ({"spatial_weights": [torch.ones(1, 2, 2)] * 2}, r"spatial_weights\[1\] is \(1, 2, 2\)"),
        ({"channel_weights": [torch.ones(1, 3)] * 2}, r"channel_weights\[0\] is \(1, 3\)"),
        ({"channel_weights": torch.ones(2, 1, 2)}, "a list with one tensor"),
        (
            {"distance": "cosine", "channel_weights": [torch.ones(1, 2)] * 2},
            "takes no channel_weights",
        ),
    ],
)
def test_errors_name_the_argument(feature_imitation_loss, change, message):
    with pytest.raises(ValueError, match=message):
        feature_imitation_loss(**{"student": STUDENT, "teacher": TEACHER, **change})


# ----------------------------------------------------------------------------------- FGFI's anchors
def near_anchors(box, size, stride, anchors, threshold, offset):
    """FGFI's rule, cell by cell and anchor by anchor."""
    x1, y1, x2, y2 = box
    overlaps = {}
    for i, j, (w, h) in itertools.product(range(size[0]), range(size[1]), anchors):
        cx, cy = (j + offset) * stride, (i + offset) * stride
        across = max(0.0, min(x2, cx + w / 2) - max(x1, cx - w / 2))
        down = max(0.0, min(y2, cy + h / 2) - max(y1, cy - h / 2))
        union = w * h + (x2 - x1) * (y2 - y1) - across * down
        overlaps.setdefault((i, j), []).append(across * down / union)
    best = max(map(max, overlaps.values()))
    return sorted(cell for cell, iou in overlaps.items() if max(iou) > threshold * best)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_fgfi_marks_cells_near_anchors(feature_imitation_loss, threshold, offset):
    shapes = [[8.0, 20.0], [12.0, 30.0], [3.0, 4.0]]
    box, size, stride = [13.0, 9.0, 27.0, 41.0], (14, 11), 4.0
    expected = near_anchors(box, size, stride, shapes, threshold, offset)
    assert 0 < len(expected) < 14 * 11
    # The square of the difference is a number of its own in each cell.
    student = torch.arange(14.0 * 11).view(1, 1, *size).double().sqrt().requires_grad_()
    loss = feature_imitation_loss(
        [student],
        [torch.zeros_like(student)],
        boxes=[torch.tensor([box, [500.0, 500.0, 600.0, 600.0], [9.0, 9.0, 9.0, 30.0]])],
        strides=[stride],
        rasterize="fgfi",
        anchors=[torch.tensor(shapes)],
        anchor_threshold=threshold,
        anchor_offset=offset,
    )
    numbers = [i * 11 + j for i, j in expected]
    assert loss.item() == pytest.approx(sum(numbers) / len(numbers))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[0, 0].flatten().nonzero().flatten().tolist() == [n for n in numbers if n]


def test_fgfi_ignores_cells_as_rectangles(feature_imitation_loss):
    # No anchor comes near the region, which hides (0, 0) of the background all the same.
    loss = feature_imitation_loss(
        STUDENT[:1],
        TEACHER[:1],
        boxes=[torch.zeros(0, 4)],
        ignore_boxes=[torch.tensor([[0.0, 0, 3, 3]])],
        strides=STRIDES[:1],
        background_weight=1.0,
        rasterize="fgfi",
        anchors=[torch.tensor([[1.0, 1.0]])],
    )
    assert loss.item() == pytest.approx((2.5 + 4.5 + 8.5) / 3)


# ---------------------------------------------------------------- the compiled and the reference
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def people(images, generator, count=4, extent=(60.0, 80.0)):
    """Boxes of any size, some partly or wholly outside, some with NaN or infinity."""
    odd = torch.tensor(
        [
            [-1e9, -5.0, 1e9, 5.0],
            [float("nan"), 0.0, 9.0, 9.0],
            [3.0, 3.0, float("inf"), 20.0],
            [900.0, 900.0, 950.0, 950.0],
            [7.0, 7.0, 7.0, 7.0],
            [9.0, 9.0, 2.0, 30.0],
        ]
    )
    boxes = []
    for image in range(images):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor(extent[::-1]) - 10
        side = torch.rand(count, 2, generator=generator) ** 2 * 60
        boxes.append(torch.cat([torch.cat([corner, corner + side], 1), odd[image::2]]))
    return boxes


def mask_options(name, images, sizes, channels, generator):
    boxes = people(images, generator)
    strides = [4.0 * 2**level for level in range(len(sizes))]
    rand = functools.partial(torch.rand, generator=generator)
    attention = {
        "spatial_weights": [rand(images, *size) - 0.2 for size in sizes],
        "channel_weights": [rand(images, channels).clamp(min=0.3) - 0.3 for _ in sizes],
    }
    attention["spatial_weights"] = [w.clamp(min=0) for w in attention["spatial_weights"]]
    # Beside people, who are of the finest level, a box of every level that covers a corner of it.
    corners = torch.tensor([[-14.4, -14.4, 1.6, 1.6]]) * torch.tensor(strides)[:, None]
    masked = {"boxes": [torch.cat([b, corners]) for b in boxes], "strides": strides}
    return {
        "whole": {"level_weights": [0.5 + level for level in range(len(sizes))]},
        "boxes": masked,
        "weighted": {
            **masked,
            "ignore_boxes": people(images, generator, 2),
            "assign_ignore": "all",
            "background_weight": 0.3,
            "foreground_weight": 1.7,
            "rasterize": "defeat",
            "level_weights": torch.rand(len(sizes), generator=generator),
        },
        "area": {
            **masked,
            "ignore_boxes": people(images, generator, 2),
            "box_weights": "area",
            "rasterize": "fgd",
            "background_weight": 0.01,
        },
        "anchors": {
            **masked,
            "rasterize": "fgfi",
            "anchors": [torch.tensor([[4.0, 9.0], [7.0, 5.0]]) * s for s in strides],
            "anchor_offset": 0.5,
            "background_weight": 0.1,
        },
        "attention": attention,
        "masked attention": {**masked, **attention},
    }[name]


MASKS = ["whole", "boxes", "weighted", "area", "anchors", "attention", "masked attention"]
# Levels of many strips, of an odd size, of few cells; one of a single cell is with the any shapes.
SIZES = ((37, 48), (9, 7), (2, 1))


def results(impl, student, teacher, adapters, dtype, options):
    """Loss and gradients of student maps and adapters in float64."""
    upstream = 3e4  # as a gradient scaler has it, so that float16 does not run out of exponents
    student = [s.to(dtype).detach().requires_grad_() for s in student]
    adapters = [
        a and tuple(x if x is None else x.to(dtype).detach().requires_grad_() for x in a)
        for a in adapters
    ]
    loss = ops.feature_imitation_loss(
        student,
        [t.to(dtype) for t in teacher],
        adapter=adapters if any(adapters) else None,
        impl=impl,
        **options,
    )
    leaves = student + [x for a in adapters if a for x in a if x is not None]
    gradients = torch.autograd.grad(loss, leaves, torch.tensor(upstream).to(loss))
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    return loss.detach(), [g.double() for g in gradients]


def compare(student, teacher, adapters, dtype, options):
    """At most twice the error of the reference at the same precision, both against float64."""
    stored = [[m.to(dtype) for m in maps] for maps in (student, teacher)]
    adapters = [a and tuple(x if x is None else x.to(dtype) for x in a) for a in adapters]
    exact, exact_gradients = results("reference", *stored, adapters, torch.float64, options)
    fused, fused_gradients = results("fused", *stored, adapters, dtype, options)
    plain, plain_gradients = results("reference", *stored, adapters, dtype, options)
    assert fused.dtype == plain.dtype
    assert exact != 0 and any(g.norm() > 0 for g in exact_gradients)
    if dtype == torch.float64:
        torch.testing.assert_close(fused, exact, rtol=1e-11, atol=0)
        for f, x in zip(fused_gradients, exact_gradients, strict=True):
            assert (f - x).norm() <= 1e-11 * x.norm()
        return
    unit = torch.finfo(fused.dtype).eps * exact.abs()
    assert (fused - exact).abs() <= 2 * (plain - exact).abs() + 4 * unit
    for index, (f, e, x) in enumerate(
        zip(fused_gradients, plain_gradients, exact_gradients, strict=True)
    ):
        error, plain_error = (f - x).norm(), (e - x).norm()
        slack = torch.finfo(dtype).eps * x.norm() / 2
        assert error <= 2 * plain_error + slack, (index, error, plain_error, x.norm())


@rule("Fused operators are as exact as PyTorch")
@pytest.mark.parametrize("layouts", ["nchw nchw", "nhwc nhwc", "nchw nhwc", "nhwc nchw"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_compiled_is_as_exact_as_pytorch(distance, mask, layouts):
    if distance == "pkd" and mask != "whole" or distance == "cosine" and "attention" in mask:
        pytest.skip("refused")
    generator = torch.Generator().manual_seed(2)
    maps = [
        [
            torch.randn(2, 35, *size, generator=generator).to(memory_format=LAYOUTS[layout])
            for size in SIZES
        ]
        for layout in layouts.split()
    ]
    options = mask_options(mask, 2, SIZES, 35, generator)
    for dtype in FLOATS:
        compare(*maps, [None] * 3, dtype, {"distance": distance, **options})


@pytest.mark.parametrize("mask", ["whole", "weighted", "masked attention"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_compiled_adapters_are_as_exact_as_pytorch(distance, mask, layout):
    if distance == "pkd" and mask != "whole" or distance == "cosine" and "attention" in mask:
        pytest.skip("refused")
    generator = torch.Generator().manual_seed(3)
    randn = functools.partial(torch.randn, generator=generator)
    sizes = ((40, 56), *SIZES[1:], (4, 5))
    student = [randn(2, c, *s) for c, s in zip((5, 5, 7, 6), sizes, strict=True)]
    student = [s.to(memory_format=LAYOUTS[layout]) for s in student]
    teacher = [randn(2, 7, *s) + 0.5 for s in sizes]
    # What a bias adds is taken off again by pkd: the exact gradient is 0.
    shared, bias = randn(7, 5), randn(7) if distance != "pkd" else None
    # Shared by two levels, none where the widths are equal, without a bias.
    adapters = [(shared, bias), (shared, bias), None, (randn(7, 6), None)]
    options = {"distance": distance, **mask_options(mask, 2, sizes, 7, generator)}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        compare(student, teacher, adapters, dtype, options)


def test_levels_that_share_an_adapter_get_one_gradient(feature_imitation_loss):
    student, teacher = random_pyramids(channels=(2, 3))
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = feature_imitation_loss(student, teacher, adapter=(weight, bias))
    shared = torch.autograd.grad(loss, (weight, bias))
    own = [[x.detach().clone().requires_grad_() for x in (weight, bias)] for _ in student]
    loss = feature_imitation_loss(student, teacher, adapter=own)
    apart = torch.autograd.grad(loss, [x for pair in own for x in pair])
    torch.testing.assert_close(shared, (apart[0] + apart[2], apart[1] + apart[3]))


@pytest.mark.parametrize("mask", ["whole", "boxes"])
def test_adapters_of_more_cells_than_are_adapted_at_once(mask):
    generator = torch.Generator().manual_seed(9)
    randn = functools.partial(torch.randn, generator=generator)
    sizes = ((256, 257), (3, 5))  # of 2^16 rows at a time
    student, teacher = ([randn(1, c, *s) for s in sizes] for c in (2, 3))
    # Stripes of the finest level that cover all of it, and a box of the other.
    stripes = [[0.0, 12.0 * i, 1028.0, 12.0 * i + 12] for i in range(86)]
    boxes = [torch.tensor([*stripes, [0.0, 0.0, 2000.0, 1000.0]])]
    options = {} if mask == "whole" else {"boxes": boxes, "strides": STRIDES}
    compare(student, teacher, [(randn(3, 2), randn(3))] * 2, torch.float32, options)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_pkd_does_not_cancel(layout):
    """Means of 10^4 deviations, and an outlier in the first cell."""
    generator = torch.Generator().manual_seed(4)
    maps = [1000 + 0.1 * torch.randn(2, 3, 40, 50, generator=generator) for _ in range(2)]
    maps[0][0, 1, 0, 0] = 0.0
    maps = [[m.to(memory_format=LAYOUTS[layout])] for m in maps]
    compare(*maps, [None], torch.float32, {"distance": "pkd"})


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_fused_equals_the_reference_for_any_shape(data):
    draw = data.draw
    images, levels = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    channels = draw(st.sampled_from([0, 1, 3, 16, 255, 257]))
    sizes = [(draw(st.integers(0, 20)), draw(st.integers(0, 20))) for _ in range(levels)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    distance = draw(st.sampled_from(DISTANCES))
    mask = draw(st.sampled_from(MASKS))
    if distance == "pkd":
        mask = "whole"
    elif distance == "cosine" and "attention" in mask:
        mask = "boxes"
    options = {"distance": distance, **mask_options(mask, images, sizes, channels, generator)}
    if draw(st.booleans()) and "boxes" in options:
        options["boxes"] = [b[:0] for b in options["boxes"]]

    def stored(dtype):
        maps = []
        for size in sizes:
            kind = draw(st.sampled_from(["nchw", "nhwc", "strided"]))
            m = torch.randn(images, channels, *size, generator=generator).to(dtype)
            if kind == "strided":
                maps.append(torch.stack([m, m], -1)[..., 0].transpose(2, 3).contiguous().mT)
            else:
                maps.append(m.to(memory_format=LAYOUTS[kind]))
        return maps

    student, teacher = (stored(draw(st.sampled_from(FLOATS))) for _ in range(2))
    upstream = draw(st.sampled_from([1.0, 0.0, -2.5]))

    def run(impl):
        leaves = [s.detach().requires_grad_() for s in student]
        loss = ops.feature_imitation_loss(leaves, teacher, impl=impl, **options)
        gradients = torch.autograd.grad(loss, leaves, torch.tensor(upstream).to(loss))
        return loss, gradients

    loss, gradients = run("fused")
    expected, expected_gradients = run("reference")
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6)
    for g, e, s in zip(gradients, expected_gradients, student, strict=True):
        assert g.dtype == s.dtype and g.isfinite().all()
        # A standardised channel of a cell or two and a cosine of equal directions cancel.
        tolerance = 2e-3 if distance in ("pkd", "cosine") else 2e-5
        least = 1e-6
        if distance == "cosine":
            # The gradient of a cell is a direction over its length; of one channel that is 0 / |s|.
            lengths = s.double().norm(dim=1).clamp(min=1e-4)
            least += torch.finfo(torch.float32).eps * abs(upstream) * (1 / lengths).norm()
        error = (g.double() - e.double()).norm()
        assert error <= max(tolerance, 2 * torch.finfo(s.dtype).eps) * e.double().norm() + least
        if s.is_contiguous() or s.is_contiguous(memory_format=torch.channels_last):
            assert g.stride() == s.stride()


@pytest.mark.parametrize("teacher_dtype", FLOATS)
@pytest.mark.parametrize("student_dtype", FLOATS)
def test_each_side_is_read_as_stored(student_dtype, teacher_dtype):
    student, teacher = random_pyramids(channels=(19, 19))
    student = [s.to(student_dtype).to(memory_format=torch.channels_last) for s in student]
    teacher = [t.to(teacher_dtype) for t in teacher]
    fused, plain = (ops.feature_imitation_loss(student, teacher, impl=impl) for impl in IMPLS)
    assert fused.dtype == plain.dtype
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)


def options_of_everything(sizes, channels, images=2):
    generator = torch.Generator().manual_seed(5)
    return mask_options("weighted", images, sizes, channels, generator)


@rule("The number of threads changes no bit of an operator")
@pytest.mark.parametrize("distance", ["mse", "cosine", "pkd"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("adapted", [False, True])
def test_the_number_of_threads_changes_no_bit(distance, layout, adapted):
    sizes = ((96, 128), (24, 32), (12, 16))
    generator = torch.Generator().manual_seed(6)
    student, teacher = (
        [
            torch.randn(2, c, *s, generator=generator).to(memory_format=LAYOUTS[layout])
            for s in sizes
        ]
        for c in (64 - 16 * adapted, 64)
    )
    options = {} if distance == "pkd" else options_of_everything(sizes, 64)
    adapter = [(torch.randn(64, 48, generator=generator), torch.randn(64)) for _ in sizes]
    adapters = adapter if adapted else [None] * 3
    options["distance"] = distance
    assert_same_for_any_number_of_threads(
        lambda: results("fused", student, teacher, adapters, torch.float32, options)
    )


@rule("The number of threads changes no bit of an operator")
def test_the_number_of_threads_changes_no_bit_of_a_long_sum_in_an_adapter():
    # A library of matrix products may cut a sum of this length into one part a thread.
    generator = torch.Generator().manual_seed(7)
    student, teacher = ([torch.randn(1, c, 8, 8, generator=generator)] for c in (1024, 64))
    adapter = [(torch.randn(64, 1024, generator=generator), None)]
    assert_same_for_any_number_of_threads(
        lambda: results("fused", student, teacher, adapter, torch.float32, {})
    )


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_gradients_larger_than_the_caches_of_any_alignment(layout):
    # Beyond 4 MB a gradient is stored past the caches by whole lines; an odd width and 67 channels
    # leave parts of lines and a rest of the planes that are taken at once.
    generator = torch.Generator().manual_seed(8)
    student, teacher = (
        torch.randn(1, 67, 129, 131, generator=generator).to(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    student.requires_grad_()
    boxes = torch.tensor([[3.0, 10, 15, 61], [40, 20, 43, 90], [100, 64, 131, 129]])
    options = dict(boxes=[boxes], strides=[1.0])
    gradients = []
    for implementation in (ops.feature_imitation_loss, reference.feature_imitation_loss):
        loss = implementation([student], [teacher], **options)
        gradients.append(torch.autograd.grad(loss, student)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=0)


@rule("A call is one operator forward and one backward")
@pytest.mark.parametrize("mask, adapted", [("whole", False), ("weighted", True)])
def test_one_operator_forward_and_one_backward(mask, adapted):
    student, teacher = random_pyramids(channels=(4 if adapted else 6, 6), dtype=torch.float32)
    leaves = [s.requires_grad_() for s in student]
    adapter = None
    if adapted:
        adapter = (torch.randn(6, 4, requires_grad=True), torch.randn(6, requires_grad=True))
        leaves += adapter
    generator = torch.Generator().manual_seed(7)
    options = mask_options(mask, 2, ((5, 7), (3, 4)), 6, generator)
    one = torch.ones(())
    views = ("aten.detach", "aten.lift_fresh")
    with OperatorCalls() as calls:
        loss = ops.feature_imitation_loss(student, teacher, adapter=adapter, **options)
    assert [n for n in calls.names if n not in views] == ["hkd_d2.feature_imitation_loss"]
    with OperatorCalls() as calls:
        torch.autograd.grad(loss, leaves, one)
    assert [n for n in calls.names if n not in views] == ["hkd_d2.feature_imitation_loss_backward"]


def test_the_cpu_kernel_is_compiled():
    assert ("feature_imitation_loss", "cpu") in _library.COMPILED


def test_fused_and_reference_take_the_same_arguments():
    from hkd_d2.ops import feature_imitation

    fused = inspect.signature(feature_imitation._arguments)
    assert fused.parameters == inspect.signature(reference.feature_imitation_loss).parameters


def test_double_backward_is_refused():
    student, teacher = random_pyramids()
    student[0].requires_grad_()
    loss = ops.feature_imitation_loss(student, teacher, impl="fused")
    (gradient,) = torch.autograd.grad(loss, student[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; pass impl='reference'"):
        torch.autograd.grad(gradient.sum(), student[0])


@pytest.mark.parametrize("distance", ["mse", "cosine", "pkd"])
def test_registered_as_pytorch_wants_it(distance):
    student, teacher = random_pyramids(channels=(2, 3), dtype=torch.float32)
    weight, bias = torch.randn(3, 2, requires_grad=True), torch.randn(3, requires_grad=True)
    options = {} if distance == "pkd" else options_of_everything(((5, 7), (3, 4)), 3)
    calls = []

    class Catch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Catch():
        leaves = [s.requires_grad_() for s in student]
        loss = ops.feature_imitation_loss(
            leaves, teacher, distance=distance, adapter=(weight, bias), **options
        )
        loss.backward()
    own = [call for call in calls if "hkd_d2" in str(call[0])]
    assert len(own) == 2
    for func, args in own:
        if "backward" in str(func):
            args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        else:
            args = (leaves, args[1], [weight], [bias], *args[4:])
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_fake_tensors_mirror_the_kernel(layout):
    """On a device that is not there, with the strides of the real one."""
    sizes = ((6, 8), (3, 4))
    with FakeTensorMode():
        student, teacher = (
            [
                torch.empty(2, c, *s, device="cuda", dtype=torch.bfloat16).to(
                    memory_format=LAYOUTS[layout]
                )
                for s in sizes
            ]
            for c in (5, 7)
        )
        weight = torch.empty(7, 5, device="cuda")
        boxes = [torch.empty(3, 4, device="cuda")] * 2
        arguments = ops.feature_imitation._arguments(
            student, teacher, boxes=boxes, strides=STRIDES, adapter=(weight, None)
        )
        loss, saved = torch.ops.hkd_d2.feature_imitation_loss(*arguments)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        assert [x.shape for x in saved] == [(2, 6, 8), (2, 3, 4), (2,)]
        gradients, weights, biases = torch.ops.hkd_d2.feature_imitation_loss_backward(
            loss, student, teacher, [weight], [], [], saved, [0, 0], [-1, -1], 0
        )
        assert biases == []
        for gradient, leaf in zip([*gradients, *weights], [*student, weight], strict=True):
            assert gradient.stride() == leaf.stride() and gradient.dtype == leaf.dtype
            assert gradient.shape == leaf.shape and gradient.device.type == "cuda"


@pytest.mark.parametrize("mask", ["whole", "weighted"])
def test_compiles_without_a_graph_break(feature_imitation_loss, impl, mask):
    if impl == "reference" and mask == "weighted":
        pytest.skip("takes seconds, and is nothing that anyone compiles")
    student, teacher = random_pyramids(channels=(4, 6))
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(8)
    options = mask_options(mask, 2, ((5, 7), (3, 4)), 6, generator)
    leaves = [*(s.requires_grad_() for s in student), weight]

    def loss():
        return feature_imitation_loss(student, teacher, adapter=(weight, None), **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = loss(), compiled()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)
    )
