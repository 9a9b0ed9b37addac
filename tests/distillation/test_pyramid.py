"""What makes published methods of the pyramid term: FGFI, DeFeat, PKD, CWD, by hand."""

import math

import pytest
import torch

from helpers.rules import rule
from helpers.small_maps import NOTHING, SIZES, build_term, maps, passed, spec
from hkd_d2.distillation.detector_pass import Targets
from hkd_d2.distillation.spec import DenseSpec

pytestmark = rule("A published method has its own normaliser and weight, by hand")


def anchored(anchors=((8, 8),), strides=(4, 8)):
    """With an RPN whose anchors (width, height) stand on every cell's corner."""
    cells = [torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in anchors])] * len(strides)
    return spec(dense=DenseSpec("RPN", list(strides), cells, 0.0, None))


def build(student=None, teacher=..., **options):
    return build_term("pyramid", student or anchored(), teacher, **options)


def value(term, student, teacher=None, targets=NOTHING):
    return term(passed(student), passed(teacher or maps()), targets).item()


def box(*corners):
    return Targets(boxes=[torch.tensor([corners])], ignore_boxes=[torch.zeros(0, 4)])


FGFI = {"MASK": "boxes", "RASTERIZE": "fgfi", "REDUCTION": "cells"}


def test_fgfi_by_hand():
    # Stride 4, anchors of 8x8 centred at (4 j, 4 i), a box from (0, 0) to (8, 4) on p2.
    # Anchors of column 1 hold half of themselves in the box: IoU 32 / 64 = 0.5, the best;
    # of columns 0 and 2: 16 / 80 = 0.2; of column 3: 0.
    # Above half of the best: column 1, both rows -> (1 + 1 + 4) / (2 * 2 cells) = 1.5
    # p3 has no object of its own: 0. Mean over levels 0.75.
    student = maps(p2=[(0, 0, 1, 1), (1, 0, 1, 1), (0, 1, 1, -2), (0, 0, 2, 10), (1, 1, 3, 7)])
    target = box(0.0, 0, 8, 4)
    assert value(build(**FGFI), student, targets=target) == pytest.approx(0.75)
    # Above 0.3 of the best, 0.15: columns 0 to 2 -> (6 + 100) / (2 * 6)
    term = build(**FGFI, ANCHOR_THRESHOLD=0.3, LEVELS=["p2"])
    assert value(term, student, targets=target) == pytest.approx(106 / 12)
    assert value(build(**FGFI), student) == 0  # no object


def test_fgfi_takes_the_students_anchors_and_their_offset():
    # Half a stride away, 8x8 anchors are centred at (2 + 4 j, 2 + 4 i): the box (4, 0) to (8, 4)
    # lies in the middle of cell (0, 1), IoU 16 / 64, its neighbours' 8 / 72 across and down and
    # 4 / 76 over the corner: one cell -> 9 / 2. Anchors of the teacher do not count.
    student = anchored()
    student.dense.offset = 0.5
    term = build(student, anchored(anchors=((2, 2), (64, 64))), **FGFI, LEVELS=["p2"])
    difference = maps(p2=[(0, 0, 1, 3), (0, 1, 1, 50), (0, 0, 0, 50), (0, 0, 2, 50)])
    assert value(term, difference, targets=box(4.0, 0, 8, 4)) == pytest.approx(4.5)


def test_defeat_by_hand():
    # Box (0, 0) to (4.5, 4): DeFeat rounds 4.5 / 4 down, so one cell: (1 + 1) / (2 * 2) = 0.5.
    # The rest of p2: seven cells, one under an ignore region: (9 + 9) / (2 * 12) = 0.75.
    # p3: no object, and no difference. Mean over levels: (3 * 0.5 + 12 * 0.75) / 2 = 5.25
    student = maps(
        p2=[(0, 0, 0, 1), (1, 0, 0, -1), (0, 0, 1, 3), (1, 0, 1, -3), (0, 1, 3, 100)],
    )
    targets = Targets(
        boxes=[torch.tensor([[0.0, 0, 4.5, 4]])], ignore_boxes=[torch.tensor([[12.0, 4, 16, 8]])]
    )
    options = {"MASK": "decoupled", "REDUCTION": "half_mean", "BACKGROUND_WEIGHT": 12.0}
    term = build(**options, RASTERIZE="defeat", FOREGROUND_WEIGHT=3.0)
    assert value(term, student, targets=targets) == pytest.approx(5.25)
    # All that the box touches, two cells: (2 + 18) / (2 * 4), and no difference is left.
    term = build(**options, FOREGROUND_WEIGHT=3.0)
    assert value(term, student, targets=targets) == pytest.approx(3 * 20 / 8 / 2)


def test_split_weighs_both_in_one_mean():
    # Two of eight cells, differences 1 and 3: (2 * 1 + 0.5 * 9) / (2 * 1 + 0.5 * 7), mean over p3
    student = maps(p2=[(c, 0, j, d) for c in (0, 1) for j, d in ((0, 1), (1, 3))])
    term = build(MASK="split", FOREGROUND_WEIGHT=2.0, BACKGROUND_WEIGHT=0.5)
    assert value(term, student, targets=box(0.0, 0, 4, 4)) == pytest.approx(6.5 / 5.5 / 2)


def test_pkd_by_hand():
    # Opposite maps: correlation -1, so 2, times (n - 1) / n of the unbiased deviation:
    # p2 has 8 cells, 1.75; p3 has 2, 1. Summed over the levels as released.
    g = torch.Generator().manual_seed(0)
    teacher = {name: torch.randn(1, 2, *size, generator=g) for name, size in SIZES.items()}
    student = {name: 5 - 3 * t for name, t in teacher.items()}
    term = build(DISTANCE="pkd", REDUCTION="level_sum")
    assert value(term, student, teacher) == pytest.approx(2.75, rel=1e-5)
    assert value(build(DISTANCE="pkd"), student, teacher) == pytest.approx(1.375, rel=1e-5)


def test_cwd_by_hand():
    # p3, channel 0: the teacher's cells have 1/4 and 3/4, the student's 1/2 each; channel 1 and p2
    # agree. Mean over the channels, sum over the levels.
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    teacher = maps(p3=[(0, 0, 1, math.log(3))])
    term = build(DISTANCE="cwd", REDUCTION="level_sum")
    assert value(term, maps(), teacher) == pytest.approx(divergence / 2, rel=1e-5)
    # At temperature 2 logits of twice the size give the same, times 4.
    teacher = maps(p3=[(0, 0, 1, 2 * math.log(3))])
    term = build(DISTANCE="cwd", REDUCTION="level_sum", TEMPERATURE=2.0)
    assert value(term, maps(), teacher) == pytest.approx(4 * divergence / 2, rel=1e-5)
    # With the house's mean over levels, and a third channel from an adapter of ones.
    term = build(teacher=spec(channels=3), DISTANCE="cwd")
    for adapter in term.adapters.values():
        torch.nn.init.ones_(adapter.weight)
    teacher = maps(channels=3, p3=[(c, 0, 1, math.log(3)) for c in range(3)])
    agrees = maps(p3=[(0, 0, 1, math.log(1.5)), (1, 0, 1, math.log(2))])
    assert value(term, agrees, teacher) == pytest.approx(0, abs=1e-6)
    assert value(term, maps(), teacher) == pytest.approx(divergence / 2, rel=1e-5)


def test_cells_and_level_sum_under_a_normaliser():
    # Teacher's variance 1 on p2 (values 0 and 2), 100 on p3: differences 1 and 20.
    teacher = {"p2": torch.tensor([0.0, 2]).repeat(8).view(1, 2, 2, 4)}
    teacher["p3"] = torch.tensor([0.0, 20]).repeat(2).view(1, 2, 1, 2)
    student = {"p2": teacher["p2"] + 1, "p3": teacher["p3"] + 20}
    options = {"NORMALIZE": "teacher_variance"}
    expected = {"mean": 2.5, "half_mean": 1.25, "level_sum": 5.0, "cells": 2.5}  # C / 2 is 1
    for reduction, number in expected.items():
        found = value(build(**options, REDUCTION=reduction), student, teacher)
        assert found == pytest.approx(number, rel=1e-5), reduction


@pytest.mark.parametrize("mode, expected", [("conv3x3", 18.0), ("conv3x3_relu", 13.0)])
def test_adapters_on_the_whole_map(mode, expected):
    # Ones through a kernel of ones: 4 in the four corners of a 2x4 map, 6 in its other four cells,
    # mean square (16 + 36) / 2 = 26. Two channels, the second with the sign turned and bias 2:
    # -2 and -4 -> without ReLU the mean of 26 and (4 + 16) / 2 = 10 is 18, with it (26 + 0) / 2.
    term = build(LEVELS=["p2"], ADAPTER=mode)
    convolution = next(m for m in term.modules() if isinstance(m, torch.nn.Conv2d))
    assert convolution.weight.abs().max() <= 2e-4 and convolution.weight.std() > 5e-5
    assert not convolution.bias.any()
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[0, 0], convolution.weight[1, 0] = 1.0, -1.0
        convolution.bias[1] = 2.0
    student = maps(p2=[(0, i, j, 1) for i in range(2) for j in range(4)])
    assert value(term, student) == pytest.approx(expected)


METHODS = {
    "fgfi": FGFI | {"ADAPTER": "conv3x3_relu"},
    "defeat": {"MASK": "decoupled", "RASTERIZE": "defeat", "ADAPTER": "conv3x3"},
    "pkd": {"DISTANCE": "pkd", "ADAPTER": "always"},
    "cwd": {"DISTANCE": "cwd", "ADAPTER": "always"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", [NOTHING, box(0.0, 0, 8, 4)], ids=["empty", "boxes"])
def test_gradients_reach_the_student_and_every_parameter(method, targets):
    term = build(**METHODS[method])
    g = torch.Generator().manual_seed(0)
    student = {n: torch.randn(1, 2, *s, generator=g).requires_grad_() for n, s in SIZES.items()}
    teacher = {n: torch.randn(1, 2, *s, generator=g).requires_grad_() for n, s in SIZES.items()}
    loss = term(passed(student), passed(teacher), targets)
    loss.backward()
    assert loss.dtype == torch.float32
    parameters = dict(term.named_parameters())
    assert parameters and all(p.grad is not None for p in parameters.values())
    assert all(t.grad is None for t in teacher.values())
    nothing = method == "fgfi" and targets is NOTHING
    assert bool(student["p2"].grad.any()) is not nothing
    assert any(p.grad.any() for p in parameters.values()) is not nothing


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"RASTERIZE": "fgd", "MASK": "boxes"}, "HKD.PYRAMID.RASTERIZE is 'fgd'; choose from"),
        ({"RASTERIZE": "fgfi"}, "MASK none, which looks at no box; choose boxes, split"),
        ({"REDUCTION": "sum"}, "HKD.PYRAMID.REDUCTION is 'sum'; choose from mean, half_mean"),
        ({"REDUCTION": "cells", "DISTANCE": "pkd"}, "REDUCTION cells counts channels"),
        ({"REDUCTION": "half_mean", "DISTANCE": "cosine"}, "half_mean counts channels"),
        ({"DISTANCE": "cwd", "MASK": "split"}, "cwd compares whole maps; set HKD.PYRAMID.MASK"),
        ({"TEMPERATURE": 2.0}, "HKD.PYRAMID.TEMPERATURE is 2.0; give .* 1 where"),
        ({"TEMPERATURE": 0.0, "DISTANCE": "cwd"}, "HKD.PYRAMID.TEMPERATURE is 0.0"),
        ({"FOREGROUND_WEIGHT": 3.0}, "FOREGROUND_WEIGHT has no effect where HKD.PYRAMID.MASK is"),
        ({"BACKGROUND_WEIGHT": -1.0, "MASK": "split"}, "BACKGROUND_WEIGHT is -1.0; give a number"),
        ({**FGFI, "ANCHOR_THRESHOLD": 1.0}, "ANCHOR_THRESHOLD is 1.0; give a share"),
        ({"ADAPTER": "5x5"}, "choose from auto, always, conv3x3, conv3x3_relu"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**options)


def test_fgfi_needs_anchors_on_every_level():
    with pytest.raises(ValueError, match="level of stride 8 has no anchors .*HKD.PYRAMID.LEVELS"):
        build(anchored(strides=(4,)), **FGFI)
    with pytest.raises(ValueError, match="fgfi needs MODEL.ANCHOR_GENERATOR.NAME"):
        build(spec(), **FGFI)
