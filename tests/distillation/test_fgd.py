"""FGD against numbers worked by hand, with its own normaliser: sums over the number of images."""

import functools
import math

import pytest
import torch

from helpers.rules import rule
from helpers.small_maps import NOTHING, SIZES, build_term, maps, passed, spec
from hkd_d2.distillation.detector_pass import Targets
from hkd_d2.distillation.fgd import GlobalContext
from hkd_d2.distillation.masks import focal_weights

pytestmark = rule("A published method has its own normaliser and weight, by hand")

build = functools.partial(build_term, "fgd")

PARTS = ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT", "ATTENTION_WEIGHT", "RELATION_WEIGHT")


def only(part, **options):
    return build(**(dict.fromkeys(PARTS, 0.0) | {part: 1.0}), **options)


# Boxes of the first image: (0, 0) to (4.5, 4), and a smaller one in its corner. The second image
# has none. Ignore regions: the last cell of p2; in the second image a corner, which FGD's rounding
# lets cover two by two cells of p2 and all of p3.
TARGETS = Targets(
    boxes=[torch.tensor([[0.0, 0, 4.5, 4], [0, 0, 1, 1]]), torch.zeros(0, 4)],
    ignore_boxes=[torch.tensor([[12.0, 4, 16, 8]]), torch.tensor([[0.0, 0, 3, 3]])],
)


def test_weights_of_cells_by_hand():
    # Stride 4: floor(0) to ceil(4.5 / 4) = 2 inclusive is 3 columns, rows 0 to 1: 1 / 6 each; the
    # small box has 2 by 2 cells, 1 / 4, and rules where both are. The last column is background but
    # for the ignored cell: one cell, so 1. The second image: four cells of background.
    weights = focal_weights(TARGETS.boxes, TARGETS.ignore_boxes, (2, 4), 4.0, 3.0, 2.0)
    first = torch.tensor([[3 / 4, 3 / 4, 3 / 6, 2], [3 / 4, 3 / 4, 3 / 6, 0]])
    second = torch.tensor([0, 0, 2 / 4, 2 / 4]).repeat(2, 1)
    assert torch.allclose(weights, torch.stack([first, second]))
    # Stride 8, a map of one row: the boxes have two rows there all the same, 2 by 2 cells, and the
    # region ignores nothing that they cover.
    weights = focal_weights(TARGETS.boxes, TARGETS.ignore_boxes, (1, 2), 8.0, 3.0, 2.0)
    assert torch.allclose(weights, torch.tensor([[[3 / 4, 3 / 4]], [[0.0, 0]]]))


def test_objects_and_background_by_hand():
    # The teacher is 0, so its attention is 1 everywhere.
    student = maps(
        p2=[(0, 0, 0, 1), (1, 0, 0, 1), (0, 0, 2, 3), (0, 0, 3, 10), (0, 1, 3, 99)],
        p3=[(0, 0, 1, 2)],
    )
    second = maps(p2=[(1, 1, 2, 4)])
    student = {n: torch.cat([x, second[n]]) for n, x in student.items()}
    teacher = {n: torch.zeros_like(x) for n, x in student.items()}

    def value(term):
        return term(passed(student), passed(teacher), TARGETS).item()

    # p2: (1 + 1) / 4 + 9 / 6 = 2, p3: 4 / 4 = 1; over two images
    assert value(only("FOREGROUND_WEIGHT")) == pytest.approx(1.5)
    # 100 / 1 in the first image, 16 / 4 in the second
    assert value(only("BACKGROUND_WEIGHT")) == pytest.approx(52)
    # At the start both relations are the maps themselves: 1 + 1 + 9 + 100 + 99^2 + 4 + 16
    assert value(only("RELATION_WEIGHT")) == pytest.approx((131 + 99**2) / 2)
    whole = build(**dict(zip(PARTS, (2.0, 0.5, 0.0, 0.1), strict=True)))
    assert value(whole) == pytest.approx(2 * 1.5 + 0.5 * 52 + 0.1 * (131 + 99**2) / 2)


def test_the_teachers_attention_by_hand():
    # p3 has two cells. The teacher has 2 v in channel 0 of the second, v = ln(3) / 2:
    # mean over channels (0, v), over T = 1/2 (0, ln 3), softmax (1/4, 3/4), times 2: (1/2, 3/2);
    # mean over cells (v, 0), likewise (3/2, 1/2). The student's is 1 everywhere.
    v = math.log(3) / 2
    teacher = maps(p3=[(0, 0, 1, 2 * v)])
    target = Targets(boxes=[torch.tensor([[0.0, 0, 8, 4]])], ignore_boxes=[torch.zeros(0, 4)])

    def value(term):
        return term(passed(maps()), passed(teacher), target).item()

    # The box has two rows and two columns on p3: 1/4 * 3/2 * 3/2 * (2 v)^2
    assert value(only("FOREGROUND_WEIGHT")) == pytest.approx(9 / 4 * v**2, rel=1e-5)
    # 1/2 for each of two cells and two channels
    assert value(only("ATTENTION_WEIGHT")) == pytest.approx(2, rel=1e-5)
    # At twice the temperature the logarithms are halved: softmax (1, sqrt 3) / (1 + sqrt 3)
    off = 2 * math.sqrt(3) / (1 + math.sqrt(3)) - 1
    assert value(only("ATTENTION_WEIGHT", TEMPERATURE=1.0)) == pytest.approx(4 * off, rel=1e-5)


def test_global_context_by_hand():
    # Two cells, pooled 1/4 and 3/4 (logits 0 and ln 3 of channel 2): channels 0 and 1 give 3 and 1,
    # normalised 1 and -1, after ReLU 1 and 0; the last layer spreads the 1 as (1, 2, 3, 4).
    block = GlobalContext(4)
    feature = torch.tensor([[[[0.0, 4]], [[4, 0]], [[0, 1]], [[0, 0]]]])
    assert torch.equal(block(feature), feature)  # the identity at the start
    with torch.no_grad():
        block.pool.weight.zero_()
        block.pool.weight[0, 2] = math.log(3)
        first, _, _, last = block.transform
        first.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]))
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[1.0, 9], [2, 9], [3, 9], [4, 9]]))
    added = block(feature) - feature
    assert torch.allclose(added, torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1).expand(1, 4, 1, 2),
                          rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize("targets", [NOTHING, TARGETS], ids=["empty", "boxes"])
def test_gradients_reach_the_student_and_every_parameter(targets):
    n = len(targets.boxes)
    term = build(teacher=spec(channels=3), RELATION_WEIGHT=1.0)
    for module in term.modules():  # away from the start, where the last layers stop the gradient
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight)
    g = torch.Generator().manual_seed(0)
    student = {k: torch.randn(n, 2, *s, generator=g).requires_grad_() for k, s in SIZES.items()}
    teacher = {k: torch.randn(n, 3, *s, generator=g).requires_grad_() for k, s in SIZES.items()}
    loss = term(passed(student), passed(teacher), targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(x.grad.any() for x in student.values())
    assert all(x.grad is None for x in teacher.values())
    assert all(p.grad is not None for p in term.parameters())
    for side in (term.adapters, term.student_context, term.teacher_context):
        assert any(p.grad.any() for p in side.parameters())


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"TEMPERATURE": 0.0}, "HKD.FGD.TEMPERATURE is 0.0"),
        ({"RELATION_WEIGHT": -1.0}, "HKD.FGD.RELATION_WEIGHT is -1.0"),
        (dict.fromkeys(PARTS, 0.0), "All four weights under HKD.FGD are 0"),
        ({"LEVELS": ["p9"]}, "HKD.FGD.LEVELS names 'p9'"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**options)
