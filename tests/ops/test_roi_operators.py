"""multilevel_roi_align and roi_distillation_loss against torchvision, Detectron2 and by hand;
fused against the reference."""

import functools
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.comparisons import (
    HALF_AND_FULL,
    IMPLS,
    OperatorCalls,
    assert_as_exact,
    assert_one_operator_each_way,
    assert_same_for_any_number_of_threads,
    loss_and_gradients,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

import hkd_d2._C  # noqa: F401  the suite fails where the compiled module is missing
from helpers.command import run_code
from helpers.rules import rule
from hkd_d2 import ops
from hkd_d2.ops import _library, reference

DISTANCES = ["mse", "l1", "smooth_l1", "cosine"]
STRIDES = [4, 8, 16, 32]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture
def multilevel_roi_align(impl):
    """The tests that ask for an operator run with its fused form and with its reference."""
    return functools.partial(ops.multilevel_roi_align, impl=impl)


@pytest.fixture
def roi_distillation_loss(impl):
    return functools.partial(ops.roi_distillation_loss, impl=impl)


def random_maps(channels=5, dtype=torch.float32, seed=0, levels=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, channels, 64 >> i, 80 >> i, generator=generator, dtype=dtype)
        for i in range(levels)
    ]


def random_boxes(count=60, dtype=torch.float32, seed=1):
    """Boxes of 1 to 400 pixels on every level, some partly or wholly outside the image."""
    generator = torch.Generator().manual_seed(seed)
    boxes = []
    for rows in (count, count // 2):
        corner = torch.rand(rows, 2, generator=generator) * torch.tensor([360.0, 300.0]) - 30
        size = torch.exp(torch.rand(rows, 2, generator=generator) * 6)
        boxes.append(torch.cat([corner, corner + size], 1).to(dtype))
    return boxes


def with_image_index(boxes):
    return torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)])


def assert_same_values_and_gradients(got, expected, maps, tolerance):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)).to(got)
    for g, e in zip(
        torch.autograd.grad(got, maps, upstream),
        torch.autograd.grad(expected, maps, upstream),
        strict=True,
    ):
        torch.testing.assert_close(g, e, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
def test_equals_the_pooler_of_detectron2(multilevel_roi_align, sampling_ratio):
    poolers = pytest.importorskip("detectron2.modeling.poolers")
    structures = pytest.importorskip("detectron2.structures")
    maps = [m.requires_grad_() for m in random_maps()]
    boxes = random_boxes()
    pooler = poolers.ROIPooler(7, [1 / s for s in STRIDES], sampling_ratio, "ROIAlignV2")
    expected = pooler(maps, [structures.Boxes(b) for b in boxes])
    got = multilevel_roi_align(maps, boxes, strides=STRIDES, sampling_ratio=sampling_ratio)
    assert_same_values_and_gradients(got, expected, maps, 1e-5)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [7, (3, 2), 1])
def test_equals_torchvision_on_one_level(multilevel_roi_align, bins, dtype, sampling_ratio):
    roi_align = pytest.importorskip("torchvision.ops").roi_align
    maps = [random_maps(dtype=dtype, levels=1)[0].requires_grad_()]
    boxes = random_boxes(dtype=dtype)
    # Exactly on the border's rules: a cell outside, half a cell outside, the last cell, no area.
    edge = [[-8.0, -8, -2, -2], [318, 254, 324, 260], [312, 248, 320, 256], [9, 9, 9, 9]]
    boxes[0] = torch.cat([boxes[0], torch.tensor(edge, dtype=dtype)])
    expected = roi_align(maps[0], with_image_index(boxes), bins, 0.25, sampling_ratio, True)
    got = multilevel_roi_align(
        maps, boxes, strides=[4], output_size=bins, sampling_ratio=sampling_ratio
    )
    assert_same_values_and_gradients(got, expected, maps, TOLERANCE[dtype])


def test_channels_last_and_chunks_change_nothing(multilevel_roi_align, monkeypatch):
    maps, boxes = random_maps(dtype=torch.float64), random_boxes()
    expected = multilevel_roi_align(maps, boxes, strides=STRIDES)
    monkeypatch.setattr(reference, "_SAMPLES_AT_ONCE", 300)
    maps = [m.to(memory_format=torch.channels_last) for m in maps]
    got = multilevel_roi_align(maps, boxes, strides=STRIDES)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_a_ramp_by_hand(multilevel_roi_align):
    # Cell j has its centre at j + 0.5 and the value j. Bins of x 1..3 have centres 1.5 and 2.5, so
    # the values 1 and 2, whatever the number of samples.
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    for sampling_ratio in (0, 1, 2, 3):
        pooled = multilevel_roi_align(
            [ramp],
            [torch.tensor([[1.0, 1.0, 3.0, 3.0]])],
            strides=[1],
            output_size=2,
            sampling_ratio=sampling_ratio,
        )
        assert pooled.flatten().tolist() == pytest.approx([1.0, 2.0, 1.0, 2.0], abs=1e-6)


@rule("Region and logit terms compare the same boxes in the same order")
def test_rows_are_in_image_major_box_order(multilevel_roi_align):
    # Every map holds 10 * level + image; the boxes alternate between levels.
    maps = [
        torch.stack([torch.full((1, 64 >> i, 64 >> i), 10.0 * i + n) for n in range(2)])
        for i in range(2)
    ]
    small, large = [20.0, 20, 60, 60], [20.0, 20, 190, 190]
    boxes = [torch.tensor([large, small, large]), torch.tensor([small, large])]
    pooled = multilevel_roi_align(maps, boxes, strides=[4, 8], output_size=1)
    assert pooled.flatten().tolist() == pytest.approx([10, 0, 10, 1, 11], abs=1e-4)


@rule("Boxes stay float32 and losses are summed in float32, under autocast too")
def test_half_precision_features_keep_float32_boxes(multilevel_roi_align):
    # At x = 1500.6 a float16 coordinate is off by 0.4 pixels, so a ramp would show it.
    ramp = (torch.arange(512.0) - 375).half().expand(1, 1, 4, 512)
    boxes = [torch.tensor([[1500.6, 2.0, 1507.4, 14.0]])]
    pooled = multilevel_roi_align([ramp], boxes, strides=[4], output_size=1, sampling_ratio=2)
    assert pooled.dtype == torch.float16
    # centre 1504 / 4 - 0.5 = 375.5, less 375
    assert pooled.item() == 0.5
    shifted = [boxes[0] + torch.tensor([0.4, 0.0, 0.4, 0.0])]
    moved = multilevel_roi_align([ramp], shifted, strides=[4], output_size=1, sampling_ratio=2)
    assert moved.item() == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_boxes_that_are_not_finite_pool_to_zero(multilevel_roi_align, sampling_ratio):
    maps = [m.requires_grad_() for m in random_maps(dtype=torch.float64)]
    good = torch.tensor([[10.0, 10, 60, 90]])
    bad = torch.tensor([[float("nan"), 0, 9, 9], [0, 0, float("inf"), 9], [-float("inf"), 0, 9, 9]])
    pooled = multilevel_roi_align(
        maps, [torch.cat([bad, good]), bad], strides=STRIDES, sampling_ratio=sampling_ratio
    )
    alone = multilevel_roi_align(
        maps, [good, bad[:0]], strides=STRIDES, sampling_ratio=sampling_ratio
    )
    torch.testing.assert_close(pooled[3], alone[0], atol=1e-12, rtol=0)
    assert (pooled[[0, 1, 2, 4, 5, 6]] == 0).all()
    pooled.sum().backward()
    assert all(m.grad.isfinite().all() for m in maps)


def test_no_boxes_and_empty_maps(multilevel_roi_align):
    maps = [m.requires_grad_() for m in random_maps()]
    pooled = multilevel_roi_align(maps, [torch.zeros(0, 4)] * 2, strides=STRIDES)
    assert pooled.shape == (0, 5, 7, 7)
    pooled.sum().backward()
    assert all((m.grad == 0).all() for m in maps)
    empty = torch.zeros(1, 3, 0, 4, requires_grad=True)
    pooled = multilevel_roi_align([empty], [torch.tensor([[0.0, 0, 9, 9]])], strides=[4])
    assert pooled.shape == (1, 3, 7, 7) and (pooled == 0).all()
    none = torch.zeros(0, 3, 4, 4)
    assert multilevel_roi_align([none], [], strides=[4]).shape == (0, 3, 7, 7)
    for height in (0, 4):
        no_channels = torch.zeros(1, 0, height, 4)
        pooled = multilevel_roi_align([no_channels], [torch.tensor([[0.0, 0, 9, 9]])], strides=[4])
        assert pooled.shape == (1, 0, 7, 7)


@pytest.mark.parametrize(
    "distance, expected",
    # student 3, teacher 1 in both channels: parallel vectors, difference 2
    [("mse", 4.0), ("l1", 2.0), ("smooth_l1", 1.5), ("cosine", 0.0)],
)
def test_roi_distillation_by_hand(roi_distillation_loss, distance, expected):
    maps = [torch.ones(1, 2, 8, 8)]
    boxes = [torch.tensor([[4.0, 4.0, 20.0, 20.0], [8.0, 8.0, 12.0, 30.0]])]
    loss = roi_distillation_loss([3 * maps[0]], maps, boxes, strides=[4], distance=distance)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    none = roi_distillation_loss(maps, maps, [torch.zeros(0, 4)], strides=[4], distance=distance)
    assert none.item() == 0
    no_channels = [torch.ones(1, 0, 8, 8)]
    assert (
        roi_distillation_loss(no_channels, no_channels, boxes, strides=[4], distance=distance) == 0
    )


def test_roi_distillation_adapter_by_hand(roi_distillation_loss):
    # One channel of 3 becomes (2 * 3 + 1, -3 + 0) = (7, -3); against (1, 1): (36 + 16) / 2 = 26
    adapter = (torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.0]))
    student, teacher = [torch.full((1, 1, 8, 8), 3.0)], [torch.ones(1, 2, 8, 8)]
    boxes = [torch.tensor([[4.0, 4.0, 20.0, 20.0]])]
    loss = roi_distillation_loss(student, teacher, boxes, strides=[4], adapter=adapter)
    assert loss.item() == pytest.approx(26.0, abs=1e-5)


@pytest.mark.parametrize("distance", ["mse", "l1", "smooth_l1", "cosine"])
def test_roi_distillation_equals_pooling_and_comparing(roi_distillation_loss, distance):
    roi_align = pytest.importorskip("torchvision.ops").roi_align
    student = [m.requires_grad_() for m in random_maps(3, torch.float64)]
    teacher = random_maps(4, torch.float64, seed=3)
    adapters = [
        (torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64))
        for _ in student
    ]
    boxes = [b.double() for b in random_boxes(20)]
    loss = roi_distillation_loss(
        student, teacher, boxes, strides=STRIDES, distance=distance, adapter=adapters
    )

    rois = with_image_index(boxes)
    level = reference.assign_boxes_to_levels(rois[:, 1:], STRIDES)
    rows = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        pooled = [roi_align(m, rois[level == i], 7, 1 / STRIDES[i], 0, True) for m in (s, t)]
        weight, bias = adapters[i]
        a = torch.einsum("tc,rcpq->rtpq", weight, pooled[0]) + bias.view(-1, 1, 1)
        b = pooled[1]
        if distance == "cosine":
            norms = a.norm(dim=1).clamp(min=1e-8) * b.norm(dim=1).clamp(min=1e-8)
            rows.append((1 - (a * b).sum(1) / norms).flatten())
        else:
            function = {"mse": "mse_loss", "l1": "l1_loss", "smooth_l1": "smooth_l1_loss"}[distance]
            difference = getattr(torch.nn.functional, function)(a, b, reduction="none")
            rows.append(difference.flatten())
    expected = torch.cat(rows).mean()
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    for g, e in zip(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True
    ):
        torch.testing.assert_close(g, e, atol=1e-10, rtol=0)


def test_roi_distillation_gradcheck(roi_distillation_loss):
    generator = torch.Generator().manual_seed(4)
    student = [torch.randn(1, 2, 6, 6, generator=generator, dtype=torch.float64)]
    teacher = [torch.randn(1, 3, 6, 6, generator=generator)]
    weight = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    leaves = [student[0].requires_grad_(), weight.requires_grad_()]
    boxes = [torch.tensor([[3.3, 2.1, 17.9, 20.7], [8.2, 1.4, 13.1, 9.7]])]

    def loss(*_):
        return roi_distillation_loss(
            student, teacher, boxes, strides=[4], output_size=3, adapter=(weight, None)
        )

    assert gradcheck(loss, leaves)


def test_the_order_of_boxes_does_not_matter(roi_distillation_loss):
    student, teacher = random_maps(dtype=torch.float64), random_maps(dtype=torch.float64, seed=3)
    boxes = random_boxes()
    loss = roi_distillation_loss(student, teacher, boxes, strides=STRIDES)
    flipped = roi_distillation_loss(student, teacher, [b.flip(0) for b in boxes], strides=STRIDES)
    torch.testing.assert_close(loss, flipped, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"boxes": random_boxes()[:1]}, "boxes has 1 entries for 2 images"),
        ({"strides": [4, 8, 16]}, "strides has 3 entries for 4 levels"),
        ({"output_size": 0}, "output_size is 0"),
        ({"distance": "pkd"}, "distance is 'pkd'; choose from mse, l1, smooth_l1, cosine"),
        ({"teacher": random_maps(6)}, "pass adapter="),
        ({"student": random_maps(levels=3)}, "student has 3 levels and teacher has 4"),
    ],
)
def test_errors_name_the_argument(roi_distillation_loss, change, message):
    arguments = {
        "student": random_maps(),
        "teacher": random_maps(),
        "boxes": random_boxes(),
        "strides": STRIDES,
    }
    with pytest.raises(ValueError, match=message):
        roi_distillation_loss(**{**arguments, **change})


def test_levels_of_another_width_cannot_be_pooled_together(multilevel_roi_align):
    maps = random_maps()
    maps[1] = maps[1][:, :2]
    with pytest.raises(ValueError, match=r"features\[1\] has 2 channels"):
        multilevel_roi_align(maps, random_boxes(), strides=STRIDES)


# ---------------------------------------------------------------- the compiled and the reference
LAYOUTS = ["nchw", "channels_last", "strided"]
# float64, in which the reference has no error to compare with, is tested against torchvision.
STORAGE = [
    (torch.float32, "nchw"),
    (torch.float32, "channels_last"),
    (torch.float16, "strided"),
    (torch.bfloat16, "nchw"),
    (torch.bfloat16, "channels_last"),
]
# Wholly and partly outside, a cell outside, huge, without area, inverted, not finite.
ODD_BOXES = torch.tensor(
    [
        [900.0, 900.0, 950.0, 950.0],
        [-300.0, 20.0, 30.0, 60.0],
        [-12.0, -12.0, -4.0, -4.0],
        [-700.0, -700.0, 900.0, 800.0],
        [7.0, 7.0, 7.0, 7.0],
        [60.0, 70.0, 20.0, 30.0],
        [60.0, 30.0, 20.0, 70.0],
        [float("nan"), 0.0, 9.0, 9.0],
        [3.0, 3.0, float("inf"), 20.0],
        [-float("inf"), -float("inf"), float("inf"), float("inf")],
    ]
)


def stored(maps, layout):
    """The same values in another order in memory."""
    if layout == "channels_last":
        return [m.contiguous(memory_format=torch.channels_last) for m in maps]
    if layout == "strided":  # rows and columns swapped, every second element
        return [torch.stack([m, m], -1)[..., 0].mT.contiguous().mT for m in maps]
    return [m.contiguous() for m in maps]


def pyramid(channels, layout="nchw", dtype=torch.float32, seed=0, images=2, levels=4):
    generator = torch.Generator().manual_seed(seed)
    maps = [
        torch.randn(images, channels, 64 >> i, 80 >> i, generator=generator) for i in range(levels)
    ]
    return stored([m.to(dtype) for m in maps], layout)


def people(count=20, seed=1, odd=True):
    boxes = random_boxes(count, seed=seed)
    return [torch.cat([boxes[0], ODD_BOXES]), boxes[1]] if odd else boxes


def pooled_and_gradients(impl, maps, boxes, scale=1.0, **options):
    """Pooled values, and gradients for a random upstream gradient times ``scale``."""
    leaves = [m.detach().requires_grad_() for m in maps]
    pooled = ops.multilevel_roi_align(leaves, boxes, impl=impl, **options)
    generator = torch.Generator().manual_seed(2)
    # Representable in every precision that is compared.
    upstream = torch.randn(pooled.shape, generator=generator).bfloat16() * scale
    return pooled.detach(), torch.autograd.grad(pooled, leaves, upstream.to(pooled))


def assert_pooled_as_exact(maps, boxes, **options):
    """Errors of at most twice those of the reference in the same precision."""
    dtype = maps[0].dtype
    exact, exact_gradients = pooled_and_gradients(
        "reference", [m.double() for m in maps], boxes, **options
    )
    fused, gradients = pooled_and_gradients("fused", maps, boxes, **options)
    plain, plain_gradients = pooled_and_gradients("reference", maps, boxes, **options)
    assert fused.dtype == dtype and fused.shape == exact.shape
    for m, g in zip(maps, gradients, strict=True):
        assert g.dtype == dtype and g.shape == m.shape
    for got, other, true in zip(
        [fused, *gradients], [plain, *plain_gradients], [exact, *exact_gradients], strict=True
    ):
        error, plain_error = (got.double() - true).norm(), (other.double() - true).norm()
        assert error <= 2 * plain_error + torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize("bins, sampling_ratio", [(7, 0), (7, 2), ((3, 5), 0), ((5, 2), 2), (1, 3)])
@pytest.mark.parametrize("dtype, layout", STORAGE)
def test_pooling_errs_no_more_than_the_reference(dtype, layout, bins, sampling_ratio):
    assert_pooled_as_exact(
        pyramid(19, layout, dtype),
        people(),
        strides=STRIDES,
        output_size=bins,
        sampling_ratio=sampling_ratio,
    )


def adapter_of(kind, channels, wide, dtype=torch.float32, levels=4, seed=5):
    """The tensors of an adapter, which get gradients, and how to put them together."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (torch.randn(shape, generator=generator) / channels**0.5).to(dtype)

    if kind == "none":
        return [], lambda tensors: None
    if kind == "one":
        return [random(wide, channels), random(wide)], lambda tensors: tuple(tensors)
    if kind == "without bias":
        return [random(wide, channels)], lambda tensors: (tensors[0], None)
    tensors = [random(wide, channels) for _ in range(levels)] + [random(wide)]
    # A bias that two levels share, and levels without.
    biases = [None, -1, None, -1]
    return tensors, lambda tensors: [
        (tensors[i], None if biases[i] is None else tensors[biases[i]]) for i in range(levels)
    ]


def distillation(adapter="none", dtype=torch.float32, layout="nchw", channels=12, **options):
    """A loss as ``function(leaves, impl)``, and its leaves: the student, then the adapter."""
    wide = channels if adapter == "none" else channels + 9
    options = {"boxes": people(odd=options.pop("odd", True)), "strides": STRIDES, **options}
    student = pyramid(channels, layout, dtype)
    teacher = pyramid(wide, layout, dtype, seed=3)
    tensors, together = adapter_of(adapter, channels, wide, dtype)

    def function(leaves, impl="fused"):
        target = [t.to(torch.float64 if leaves[0].dtype == torch.float64 else t) for t in teacher]
        return ops.roi_distillation_loss(
            leaves[:4], target, impl=impl, adapter=together(leaves[4:]), **options
        )

    return function, [*student, *tensors]


@pytest.mark.parametrize("dtype, layout", STORAGE)
@pytest.mark.parametrize("adapter", ["none", "one"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_loss_errs_no_more_than_the_reference(distance, adapter, dtype, layout):
    # Boxes that pool to 0 would make the direction of a zero vector the error of a cosine.
    function, leaves = distillation(
        adapter, dtype, layout, distance=distance, odd=distance != "cosine"
    )
    assert_as_exact(function, leaves, dtype)


@pytest.mark.parametrize("bins, sampling_ratio", [(7, 2), ((3, 5), 0), ((1, 4), 2)])
@pytest.mark.parametrize("adapter", ["none", "one", "without bias", "one a level"])
@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_loss_with_any_bins_and_adapter(distance, adapter, bins, sampling_ratio):
    function, leaves = distillation(
        adapter,
        distance=distance,
        output_size=bins,
        sampling_ratio=sampling_ratio,
        odd=distance != "cosine",
    )
    assert_as_exact(function, leaves, torch.float32, upstream=-0.7)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_equals_torchvision(layout, sampling_ratio):
    """Also at as many channels as a detector has, where the compiled form takes wider steps."""
    roi_align = pytest.importorskip("torchvision.ops").roi_align
    maps = [m.requires_grad_() for m in pyramid(64, layout, levels=1)]
    # torchvision refuses inverted boxes, by a memory error.
    boxes = [b[b.isfinite().all(1) & (b[:, 2:] >= b[:, :2]).all(1)] for b in people()]
    expected = roi_align(maps[0], with_image_index(boxes), 7, 0.25, sampling_ratio, True)
    got = ops.multilevel_roi_align(
        maps, boxes, strides=[4], sampling_ratio=sampling_ratio, impl="fused"
    )
    assert_same_values_and_gradients(got, expected, maps, 2e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_fused_equals_the_reference_for_any_shape(data):
    draw = data.draw
    images, levels = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    channels = draw(st.sampled_from([1, 3, 255, 257]))
    sizes = [draw(st.tuples(st.integers(0, 12), st.integers(1, 12))) for _ in range(levels)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    boxes = []
    for _ in range(images):
        corner = torch.rand(draw(st.integers(0, 5)), 2, generator=generator) * 60 - 15
        side = torch.exp(torch.rand(corner.shape, generator=generator) * 5)
        odd = ODD_BOXES[draw(st.integers(0, 10)) :]
        boxes.append(torch.cat([torch.cat([corner, corner + side], 1), odd]))

    def maps(layout):
        dtype = draw(st.sampled_from(HALF_AND_FULL))
        return stored(
            [torch.randn(images, channels, *s, generator=generator).to(dtype) for s in sizes],
            layout,
        )

    layout_of_student = draw(st.sampled_from(LAYOUTS))
    student, teacher = maps(layout_of_student), maps(draw(st.sampled_from(LAYOUTS)))
    options = {
        "strides": [4.0 * 2**level for level in range(levels)],
        "output_size": draw(st.sampled_from([7, 1, (2, 3)])),
        "sampling_ratio": draw(st.sampled_from([0, 1, 2])),
    }
    # The gradient of a cosine at a bin that pools to 0 (a box outside) divides by 1e-8.
    distance = draw(st.sampled_from(DISTANCES[:3]))
    scale = draw(st.sampled_from([1.0, 0.0, -2.5]))

    def loss(impl):
        leaves = [s.detach().requires_grad_() for s in student]
        value = ops.roi_distillation_loss(
            leaves, teacher, boxes, distance=distance, impl=impl, **options
        )
        return value, torch.autograd.grad(value, leaves, torch.tensor(scale).to(value))

    for run in (loss, lambda impl: pooled_and_gradients(impl, student, boxes, scale, **options)):
        value, gradients = run("fused")
        expected, expected_gradients = run("reference")
        assert value.dtype == expected.dtype and value.shape == expected.shape
        torch.testing.assert_close(value, expected)
        for g, e, s in zip(gradients, expected_gradients, student, strict=True):
            assert g.dtype == s.dtype and g.isfinite().all()
            error = (g.double() - e.double()).norm()
            limit = max(2e-5, 2 * torch.finfo(s.dtype).eps)
            # A half's smallest numbers are few.
            assert error <= limit * e.double().norm() + 1e-6
            if s.numel() and layout_of_student != "strided":
                assert g.stride() == s.stride()


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_one_pixel_levels(sampling_ratio):
    generator = torch.Generator().manual_seed(8)
    maps = [torch.randn(2, 5, 1, 1, generator=generator).double() for _ in range(4)]
    got, expected = (
        pooled_and_gradients(i, maps, people(), strides=STRIDES, sampling_ratio=sampling_ratio)
        for i in IMPLS
    )
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    assert got[0].abs().sum() > 0


@pytest.mark.parametrize("teacher_dtype", HALF_AND_FULL)
@pytest.mark.parametrize("student_dtype", HALF_AND_FULL)
def test_each_side_is_read_as_stored(student_dtype, teacher_dtype):
    student = pyramid(12, "channels_last", student_dtype)
    teacher = pyramid(12, "nchw", teacher_dtype, seed=3)
    options = {"strides": STRIDES, "distance": "smooth_l1"}
    fused, plain = (
        ops.roi_distillation_loss(student, teacher, people(), impl=i, **options) for i in IMPLS
    )
    assert fused.dtype == plain.dtype == torch.promote_types(student_dtype, torch.float32)
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)


def test_nan_and_infinity_reach_only_the_boxes_that_read_them(impl):
    maps = pyramid(3, dtype=torch.float64, levels=1)
    clean = ops.multilevel_roi_align(maps, people(odd=False), strides=[4], impl=impl)
    maps[0][0, 1, 20, 20], maps[0][1, 2, 50, 10] = float("nan"), float("inf")
    pooled = ops.multilevel_roi_align(maps, people(odd=False), strides=[4], impl=impl)
    bad = ~pooled.isfinite()
    assert torch.equal(pooled[~bad], clean[~bad])
    rows, channels = bad.flatten(2).any(2).nonzero().T
    assert {(int(r) >= 20, int(c)) for r, c in zip(rows, channels, strict=True)} == {
        (False, 1),
        (True, 2),
    }
    # Most boxes do not come near.
    assert 0 < len(rows) < 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_nan_reaches_only_the_cells_of_its_bin(layout):
    maps = [m.requires_grad_() for m in pyramid(8, layout, levels=1)]
    boxes = [torch.tensor([[10.0, 12.0, 90.0, 70.0], [30.0, 5.0, 60.0, 80.0]])] * 2
    pooled = ops.multilevel_roi_align(maps, boxes, strides=[4], impl="fused")

    def reached(number):
        upstream = torch.zeros_like(pooled)
        upstream[1, 3, 2, 4] = number
        (gradient,) = torch.autograd.grad(pooled, maps, upstream, retain_graph=True)
        return gradient

    cells = reached(1.0) != 0
    assert 4 <= cells.sum() < 100 and torch.equal(reached(float("nan")).isnan(), cells)


# ------------------------------------------------------------------------------- what must hold
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooling_is_linear_and_its_backward_is_its_adjoint(multilevel_roi_align, sampling_ratio):
    def pool(maps):
        options = {"strides": STRIDES, "sampling_ratio": sampling_ratio, "output_size": (7, 3)}
        return multilevel_roi_align(maps, people(), **options)

    a, b = pyramid(6, dtype=torch.float64), pyramid(6, dtype=torch.float64, seed=3)
    both = pool([2 * x - 0.5 * y for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(both, 2 * pool(a) - 0.5 * pool(b), atol=1e-12, rtol=0)
    # <pool(a), u> = <a, pool'(u)> for every u
    leaves = [m.requires_grad_() for m in b]
    upstream = torch.randn(both.shape, generator=torch.Generator().manual_seed(4)).double()
    gradients = torch.autograd.grad(pool(leaves), leaves, upstream)
    inner = sum((x * g).sum() for x, g in zip(a, gradients, strict=True))
    assert inner.item() == pytest.approx((pool(a) * upstream).sum().item(), rel=1e-10)


def test_permuting_the_boxes_permutes_the_rows(multilevel_roi_align):
    maps, boxes = pyramid(6, dtype=torch.float64), people()
    generator = torch.Generator().manual_seed(4)
    orders = [torch.randperm(len(b), generator=generator) for b in boxes]
    pooled = multilevel_roi_align(maps, boxes, strides=STRIDES)
    mixed = multilevel_roi_align(
        maps, [b[o] for b, o in zip(boxes, orders, strict=True)], strides=STRIDES
    )
    rows = torch.cat([orders[0], len(boxes[0]) + orders[1]])
    torch.testing.assert_close(mixed, pooled[rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_moving_maps_and_boxes_by_a_stride_changes_nothing(multilevel_roi_align, sampling_ratio):
    # 32 pixels to the right and 64 down: whole cells of every level. Boxes stay inside.
    small, large = pyramid(6, dtype=torch.float64), []
    for level, m in enumerate(small):
        right, down = 8 >> level, 16 >> level
        large.append(torch.nn.functional.pad(m, (right, 0, down, 0)))
    generator = torch.Generator().manual_seed(4)
    corner = torch.randint(32, 60, (30, 2), generator=generator) + 0.25
    sides = torch.randint(3, 180, (30, 2), generator=generator) + 0.5
    boxes = [torch.cat([corner, corner + sides], 1)] * 2
    moved = [b + torch.tensor([32.0, 64, 32, 64]) for b in boxes]
    options = {"strides": STRIDES, "sampling_ratio": sampling_ratio}
    torch.testing.assert_close(
        multilevel_roi_align(large, moved, **options),
        multilevel_roi_align(small, boxes, **options),
        atol=1e-9,
        rtol=0,
    )


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooling_gradcheck(multilevel_roi_align, sampling_ratio):
    maps = [m[:, :, :6, :7].clone().requires_grad_() for m in pyramid(2, dtype=torch.float64)[:2]]
    boxes = [
        torch.tensor([[3.3, 2.1, 17.9, 20.7], [1.0, 2.0, 150.0, 170.0]]),
        torch.tensor([[-9.0, 3.0, 5.0, 70.0]]),
    ]

    def pool(*maps):
        return multilevel_roi_align(
            list(maps), boxes, strides=[4, 8], output_size=(3, 2), sampling_ratio=sampling_ratio
        )

    assert gradcheck(pool, maps, fast_mode=True)


@pytest.mark.parametrize("adapter", ["none", "one a level"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_loss_gradcheck(impl, distance, adapter):
    generator = torch.Generator().manual_seed(4)
    wide = 2 if adapter == "none" else 3
    student, teacher = (
        [torch.randn(1, c, *s, generator=generator).double() for s in ((6, 7), (3, 4))]
        for c in (2, wide)
    )
    tensors, together = adapter_of(adapter, 2, wide, torch.float64, levels=2)
    leaves = [x.requires_grad_() for x in [*student, *tensors]]
    boxes = [torch.tensor([[3.3, 2.1, 17.9, 20.7], [1.0, 2.0, 150.0, 170.0]])]

    def loss(*leaves):
        return ops.roi_distillation_loss(
            leaves[:2],
            teacher,
            boxes,
            strides=[4, 8],
            output_size=(3, 2),
            distance=distance,
            adapter=together(leaves[2:]),
            impl=impl,
        )

    assert gradcheck(loss, leaves, fast_mode=True)


def test_an_expanded_upstream_gradient(multilevel_roi_align):
    maps = [m.requires_grad_() for m in pyramid(6)]
    pooled = multilevel_roi_align(maps, people(), strides=STRIDES)
    expanded = torch.ones(()).expand(pooled.shape)
    strided = torch.ones_like(pooled).movedim(1, -1).contiguous().movedim(-1, 1)
    dense, *others = (
        torch.autograd.grad(pooled, maps, u, retain_graph=True)
        for u in (torch.ones_like(pooled), expanded, strided)
    )
    for other in others:
        torch.testing.assert_close(other, dense)


def test_only_the_student_and_the_adapter_get_gradients(impl, roi_distillation_loss):
    student, teacher = pyramid(4), pyramid(6, seed=3)
    boxes = people()
    weight = torch.randn(6, 4)
    for x in (*student, *teacher, *boxes, weight):
        x.requires_grad_()
    roi_distillation_loss(
        student, teacher, boxes, strides=STRIDES, adapter=(weight, None)
    ).backward()
    assert all(m.grad.abs().sum() > 0 for m in (*student, weight))
    assert all(x.grad is None for x in (*teacher, *boxes))
    pooled = ops.multilevel_roi_align(student, boxes, strides=STRIDES, impl=impl)
    pooled.sum().backward()
    assert all(b.grad is None for b in boxes)


def test_autocast_does_not_round(impl):
    function, leaves = distillation("one")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function(leaves, impl)
        pooled = ops.multilevel_roi_align(leaves[:4], people(), strides=STRIDES, impl=impl)
    assert inside.dtype == torch.float32 and torch.equal(inside, function(leaves, impl))
    assert torch.equal(
        pooled, ops.multilevel_roi_align(leaves[:4], people(), strides=STRIDES, impl=impl)
    )


@rule("The number of threads changes no bit of an operator")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_the_number_of_threads_changes_no_bit(layout, sampling_ratio):
    options = {"strides": STRIDES, "sampling_ratio": sampling_ratio}
    maps, boxes = pyramid(64, layout), people(100)
    assert_same_for_any_number_of_threads(
        lambda: pooled_and_gradients("fused", maps, boxes, **options)
    )
    function, leaves = distillation("one", layout=layout, channels=48, boxes=boxes, **options)
    assert_same_for_any_number_of_threads(lambda: loss_and_gradients(function, leaves))


def test_threads_are_not_confused_by_blocks_of_boxes_beside_the_map():
    """Nothing waits for the threads that take such boxes: they are scattered nowhere."""
    maps = pyramid(64, "channels_last")
    boxes = [torch.cat([b - 2000, b]) for b in random_boxes(200)]
    assert_same_for_any_number_of_threads(
        lambda: pooled_and_gradients("fused", maps, boxes, strides=STRIDES), repeat=10
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets_agree(isa):
    """What this machine's own set computes is tested above; it is chosen once a process."""
    program = """
        import torch
        from ops.comparisons import assert_as_exact
        from ops.test_roi_operators import *
        for dtype in (torch.float32, torch.bfloat16):
            for sampling_ratio in (0, 2):
                for layout in LAYOUTS[:2]:
                    assert_pooled_as_exact(
                        pyramid(37, layout, dtype),
                        people(),
                        strides=STRIDES,
                        sampling_ratio=sampling_ratio,
                    )
            for distance in DISTANCES:
                for adapter in ("none", "one"):
                    function, leaves = distillation(
                        adapter, dtype, distance=distance, odd=distance != "cosine", channels=37
                    )
                    assert_as_exact(function, leaves, dtype)
    """
    run_code(program, HKD_CPU_ISA=isa)


# ---------------------------------------------------------------------- as PyTorch knows them
def test_the_cpu_kernels_are_compiled():
    assert {("multilevel_roi_align", "cpu"), ("roi_distillation_loss", "cpu")} <= _library.COMPILED


@pytest.mark.parametrize("name", ["multilevel_roi_align", "roi_distillation_loss"])
def test_fused_and_reference_have_one_signature(name):
    from hkd_d2.ops import roi_align, roi_distillation

    face = roi_align if name == "multilevel_roi_align" else roi_distillation
    assert inspect.signature(getattr(face, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("adapter", ["none", "one a level"])
def test_one_operator_forward_and_one_backward(adapter):
    function, leaves = distillation(adapter)
    assert_one_operator_each_way(function, leaves, "roi_distillation_loss")
    maps, boxes = [m.requires_grad_() for m in pyramid(6)], people()
    upstream = torch.ones(40, 6, 7, 7)
    with OperatorCalls() as calls:
        pooled = ops.multilevel_roi_align(maps, boxes, strides=STRIDES)
        torch.autograd.grad(pooled, maps, upstream)
    called = [n for n in calls.names if n != "aten.detach"]
    assert called == ["hkd_d2.multilevel_roi_align", "hkd_d2.multilevel_roi_align_backward"]


def test_double_backward_of_the_distillation_is_refused():
    function, leaves = distillation()
    leaves = [x.requires_grad_() for x in leaves]
    (gradient, *_) = torch.autograd.grad(function(leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="compare the tensors of two multilevel_roi_align"):
        torch.autograd.grad(gradient.sum(), leaves[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivative_of_pooling_by_hand(layout):
    """A bin over whole cells is their mean, m = (a + b + c + d) / 4 of one sample at their middle.

    The Hessian of m^2 has 2/16 for every pair of the four cells.
    """
    maps = stored([torch.randn(1, 1, 4, 4, dtype=torch.float64)], layout)[0].requires_grad_()
    box = [torch.tensor([[1.0, 1.0, 3.0, 3.0]])]

    def square(x):
        pooled = ops.multilevel_roi_align(
            [x], box, strides=[1], output_size=1, sampling_ratio=1, impl="fused"
        )
        return pooled.square().sum()

    hessian = torch.autograd.functional.hessian(square, maps)[0, 0, :, :, 0, 0]
    expected = torch.zeros(4, 4, 4, 4, dtype=torch.float64)
    expected[1:3, 1:3, 1:3, 1:3] = 2 / 16
    torch.testing.assert_close(hessian, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_of_pooling_of_several_levels(layout):
    maps = [m[:, :, : 9 >> i, : 12 >> i] for i, m in enumerate(pyramid(3)[:2])]
    maps = [m.double() for m in maps]
    maps = [m.detach().requires_grad_() for m in stored(maps, layout)]

    def cube(*maps):
        pooled = ops.multilevel_roi_align(maps, people(3), strides=STRIDES[:2], output_size=2)
        return (pooled**3).sum()

    assert torch.autograd.gradgradcheck(cube, maps, fast_mode=True)


def calls_of(function):
    """The compiled operators that ``function`` runs, with their arguments."""
    calls = []

    class Catch(OperatorCalls):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "hkd_d2":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Catch():
        function()
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adapter", ["none", "one"])
def test_registered_as_pytorch_wants_it(layout, adapter):
    def small(channels, seed=0):
        maps = [m[:, :, : 9 >> i, : 12 >> i] for i, m in enumerate(pyramid(channels, seed=seed))]
        return [m.requires_grad_() for m in stored([m.detach() for m in maps[:2]], layout)]

    student = small(3)
    teacher = [t.detach() for t in small(3 if adapter == "none" else 4, seed=3)]
    tensors, together = adapter_of(adapter, 3, 4)
    tensors = [t.requires_grad_() for t in tensors]
    boxes, options = people(3), {"strides": STRIDES[:2], "output_size": (2, 3)}

    def run():
        ops.multilevel_roi_align(student, boxes, **options).sum().backward()
        ops.roi_distillation_loss(
            student, teacher, boxes, adapter=together(tensors), **options
        ).backward()

    calls = calls_of(run)
    assert len(calls) == 4
    leaves = [student, teacher, boxes, tensors[:1], tensors[1:]]
    for func, args in calls:
        if "backward" in str(func):
            args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        elif "distillation" in str(func):
            args = (*leaves, *args[5:])
        else:
            args = (student, *args[1:])
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_mirror_the_kernel(layout):
    """On a device that is not there, with the strides of the real one."""
    real = [m.requires_grad_() for m in pyramid(5, layout, torch.bfloat16, levels=2)]
    options = {"strides": STRIDES[:2], "output_size": (7, 3)}
    pooled = ops.multilevel_roi_align(real, people(), impl="fused", **options)
    expected = torch.autograd.grad(pooled.sum(), real)

    def check(gradients):
        for gradient, e in zip(gradients, expected, strict=True):
            assert gradient.stride() == e.stride() and gradient.dtype == e.dtype
            assert gradient.shape == e.shape and gradient.device.type == "cuda"

    with FakeTensorMode(allow_non_fake_inputs=True):
        # An empty map of the same strides.
        maps = [
            torch.empty_strided(m.shape, m.stride(), device="cuda", dtype=m.dtype) for m in real
        ]
        boxes = [torch.empty(len(b), 4, device="cuda") for b in people()]
        bins = (*options["output_size"], 0)
        strides = [float(s) for s in options["strides"]]
        fake = torch.ops.hkd_d2.multilevel_roi_align(maps, boxes, strides, *bins)
        assert fake.shape == pooled.shape and fake.stride() == pooled.stride()
        assert fake.dtype == pooled.dtype and fake.device.type == "cuda"
        shapes = [m.shape[2] for m in maps], [m.shape[3] for m in maps]
        last = [layout == "channels_last"] * 2
        check(
            torch.ops.hkd_d2.multilevel_roi_align_backward(
                fake, boxes, strides, 0, *shapes, last, False
            )
        )
        weight = torch.empty(7, 5, device="cuda")
        teacher = [torch.empty(2, 7, *m.shape[2:], device="cuda") for m in maps]
        arguments = [maps, teacher, boxes, [weight], [], [0, 0], [-1, -1], strides, *bins, 0]
        loss = torch.ops.hkd_d2.roi_distillation_loss(*arguments)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"
        student, weights, biases = torch.ops.hkd_d2.roi_distillation_loss_backward(
            loss, *arguments, False
        )
        check(student)
        assert weights[0].shape == weight.shape and weights[0].device.type == "cuda"
        assert biases == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_keep_the_layout(layout):
    maps = pyramid(5, layout)
    function, leaves = distillation("one", layout=layout)
    loss_leaves = [x.detach().requires_grad_() for x in leaves]
    gradients = torch.autograd.grad(function(loss_leaves), loss_leaves)
    _, pooled_gradients = pooled_and_gradients("fused", maps, people(), strides=STRIDES)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for g in (*gradients[:4], *pooled_gradients):
        assert g.is_contiguous(memory_format=memory_format)


def test_compiles_without_a_graph_break():
    function, leaves = distillation("one")
    leaves = [x.requires_grad_() for x in leaves]
    boxes = people()

    def pool_and_compare():
        pooled = ops.multilevel_roi_align(leaves[:4], boxes, strides=STRIDES, impl="fused")
        return function(leaves) + pooled.square().mean()

    compiled = torch.compile(pool_and_compare, fullgraph=True, backend="aot_eager")
    expected, actual = pool_and_compare(), compiled()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)
    )
