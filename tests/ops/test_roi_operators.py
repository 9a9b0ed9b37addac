"""multilevel_roi_align and roi_distillation_loss against torchvision, Detectron2 and by hand."""

import pytest
import torch
from torch.autograd import gradcheck

from hkd_d2.ops import multilevel_roi_align, reference, roi_distillation_loss

STRIDES = [4, 8, 16, 32]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


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
def test_equals_the_pooler_of_detectron2(sampling_ratio):
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
def test_equals_torchvision_on_one_level(bins, dtype, sampling_ratio):
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


def test_channels_last_and_chunks_change_nothing(monkeypatch):
    maps, boxes = random_maps(dtype=torch.float64), random_boxes()
    expected = multilevel_roi_align(maps, boxes, strides=STRIDES)
    monkeypatch.setattr(reference, "_SAMPLES_AT_ONCE", 300)
    maps = [m.to(memory_format=torch.channels_last) for m in maps]
    assert torch.equal(multilevel_roi_align(maps, boxes, strides=STRIDES), expected)


def test_a_ramp_by_hand():
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


def test_rows_are_in_image_major_box_order():
    # Every map holds 10 * level + image; the boxes alternate between levels.
    maps = [
        torch.stack([torch.full((1, 64 >> i, 64 >> i), 10.0 * i + n) for n in range(2)])
        for i in range(2)
    ]
    small, large = [20.0, 20, 60, 60], [20.0, 20, 190, 190]
    boxes = [torch.tensor([large, small, large]), torch.tensor([small, large])]
    pooled = multilevel_roi_align(maps, boxes, strides=[4, 8], output_size=1)
    assert pooled.flatten().tolist() == pytest.approx([10, 0, 10, 1, 11], abs=1e-4)


def test_half_precision_features_keep_float32_boxes():
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
def test_boxes_that_are_not_finite_pool_to_zero(sampling_ratio):
    maps = [m.requires_grad_() for m in random_maps(dtype=torch.float64)]
    good = torch.tensor([[10.0, 10, 60, 90]])
    bad = torch.tensor([[float("nan"), 0, 9, 9], [0, 0, float("inf"), 9], [-float("inf"), 0, 9, 9]])
    pooled = multilevel_roi_align(
        maps, [torch.cat([bad, good]), bad], strides=STRIDES, sampling_ratio=sampling_ratio
    )
    alone = multilevel_roi_align(
        maps, [good, bad[:0]], strides=STRIDES, sampling_ratio=sampling_ratio
    )
    assert torch.equal(pooled[3], alone[0])
    assert (pooled[[0, 1, 2, 4, 5, 6]] == 0).all()
    pooled.sum().backward()
    assert all(m.grad.isfinite().all() for m in maps)


def test_no_boxes_and_empty_maps():
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


@pytest.mark.parametrize(
    "distance, expected",
    # student 3, teacher 1 in both channels: parallel vectors, difference 2
    [("mse", 4.0), ("l1", 2.0), ("smooth_l1", 1.5), ("cosine", 0.0)],
)
def test_roi_distillation_by_hand(distance, expected):
    maps = [torch.ones(1, 2, 8, 8)]
    boxes = [torch.tensor([[4.0, 4.0, 20.0, 20.0], [8.0, 8.0, 12.0, 30.0]])]
    loss = roi_distillation_loss([3 * maps[0]], maps, boxes, strides=[4], distance=distance)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    none = roi_distillation_loss(maps, maps, [torch.zeros(0, 4)], strides=[4], distance=distance)
    assert none.item() == 0


def test_roi_distillation_adapter_by_hand():
    # One channel of 3 becomes (2 * 3 + 1, -3 + 0) = (7, -3); against (1, 1): (36 + 16) / 2 = 26
    adapter = (torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.0]))
    student, teacher = [torch.full((1, 1, 8, 8), 3.0)], [torch.ones(1, 2, 8, 8)]
    boxes = [torch.tensor([[4.0, 4.0, 20.0, 20.0]])]
    loss = roi_distillation_loss(student, teacher, boxes, strides=[4], adapter=adapter)
    assert loss.item() == pytest.approx(26.0, abs=1e-5)


@pytest.mark.parametrize("distance", ["mse", "l1", "smooth_l1", "cosine"])
def test_roi_distillation_equals_pooling_and_comparing(distance):
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


def test_roi_distillation_gradcheck():
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


def test_the_order_of_boxes_does_not_matter():
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
def test_errors_name_the_argument(change, message):
    arguments = {
        "student": random_maps(),
        "teacher": random_maps(),
        "boxes": random_boxes(),
        "strides": STRIDES,
    }
    with pytest.raises(ValueError, match=message):
        roi_distillation_loss(**{**arguments, **change})


def test_levels_of_another_width_cannot_be_pooled_together():
    maps = random_maps()
    maps[1] = maps[1][:, :2]
    with pytest.raises(ValueError, match=r"features\[1\] has 2 channels"):
        multilevel_roi_align(maps, random_boxes(), strides=STRIDES)
