"""ReviewKD against numbers worked by hand."""

import functools
import math

import pytest
import torch

from helpers.rules import rule
from helpers.small_maps import NOTHING, SIZES, build_term, maps, passed, spec
from hkd_d2.distillation.reviewkd import Fusion, hierarchical_context_loss

pytestmark = rule("A published method has its own normaliser and weight, by hand")

build = functools.partial(build_term, "reviewkd")


@pytest.mark.parametrize(
    "size, difference, expected",
    [
        # 8x8, one cell 4: 16 / 64; averages of 4x4 cells: one of 1, 1 / 16; of 2x2: one of 1/4,
        # 1 / 64; of all: 1/16, 1 / 256
        ((8, 8), 4, (1 / 4 + 1 / 2 / 16 + 1 / 4 / 64 + 1 / 8 / 256) / (15 / 8)),
        # Two rows: 1x1 alone is smaller, and weighs 1/2: 4 / 8 and (1/4)^2
        ((2, 4), 2, (1 / 2 + 1 / 2 / 16) / (3 / 2)),
        ((1, 2), 3, 9 / 2),  # one row: nothing is smaller
    ],
)
def test_hierarchical_context_by_hand(size, difference, expected):
    student = torch.zeros(1, 1, *size)
    student[..., -1, -1] = difference
    teacher = torch.zeros(1, 1, *size)
    found = hierarchical_context_loss([student], [teacher])
    assert found.item() == pytest.approx(expected, rel=1e-6)
    other = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    found = hierarchical_context_loss([student, other[0]], [teacher, other[1]])
    assert found.item() == pytest.approx(expected + 1, rel=1e-6)  # a sum over levels


def as_identity(fusion):
    """In eval mode, with attention 1/2 for the level and 3/4 for the coarser one."""
    fusion.eval()
    with torch.no_grad():
        for convolution, centre in ((fusion.reduce[0], 0), (fusion.expand[0], 1)):
            convolution.weight.zero_()
            for channel in range(2):
                convolution.weight[channel, channel, centre, centre] = 1
        if fusion.attention is not None:
            fusion.attention.weight.zero_()
            fusion.attention.bias.copy_(torch.tensor([0.0, math.log(3)]))
    return fusion


def test_fusion_by_hand():
    # 2 / 2 + 4 * 3/4 = 4; the batch norms, as built, divide by sqrt(1 + 1e-5) each
    fusion = as_identity(Fusion(2, 2, 2, fuses=True))
    output, passed_on = fusion(torch.full((1, 2, 2, 4), 2.0), torch.full((1, 2, 1, 2), 4.0))
    assert torch.allclose(output, torch.full((1, 2, 2, 4), 4.0), rtol=1e-4)
    assert torch.allclose(passed_on, output, rtol=1e-4)


def test_levels_are_fused_from_coarse_to_fine():
    # p3 is 4 in its right cell: the right half of p2 is 2 / 2 + 4 * 3/4 = 4, the left 1.
    term = build()
    for fusion in term.fusions.values():
        as_identity(fusion)
    assert term.fusions["p3"].attention is None
    student = maps(p2=[(c, i, j, 2) for c in (0, 1) for i in (0, 1) for j in range(4)])
    student["p3"][..., 1] = 4
    teacher = {"p2": torch.tensor([1.0, 1, 4, 4]).expand(1, 2, 2, 4), "p3": student["p3"]}
    assert term(passed(student), passed(teacher), NOTHING).item() == pytest.approx(0, abs=1e-6)
    # The teacher's p3 is off by 3 in one of two cells of both channels: 9 / 2
    teacher["p3"] = student["p3"] + torch.tensor([3.0, 0])
    found = term(passed(student), passed(teacher), NOTHING).item()
    assert found == pytest.approx(9 / 2, rel=1e-3)


def test_gradients_reach_the_student_and_every_parameter():
    term = build(teacher=spec(channels=3))
    g = torch.Generator().manual_seed(0)
    student = {n: torch.randn(2, 2, *s, generator=g).requires_grad_() for n, s in SIZES.items()}
    teacher = {n: torch.randn(2, 3, *s, generator=g).requires_grad_() for n, s in SIZES.items()}
    loss = term(passed(student), passed(teacher), NOTHING)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(x.grad.any() for x in student.values())
    assert all(x.grad is None for x in teacher.values())
    assert all(p.grad.any() for p in term.parameters())


def test_levels_in_another_order_are_refused():
    for levels in (("p3", "p2"), ("p2", "p2")):
        with pytest.raises(ValueError, match="HKD.REVIEWKD.LEVELS has strides .* finest first"):
            build(LEVELS=list(levels))
    with pytest.raises(ValueError, match="HKD.REVIEWKD.LEVELS names 'p9'"):
        build(LEVELS=["p2", "p9"])
