"""MGD against numbers worked by hand, and its random masks."""

import copy
import functools

import pytest
import torch

from helpers.rules import rule
from helpers.small_maps import NOTHING, SIZES, build_term, maps, passed, spec

pytestmark = rule("A published method has its own normaliser and weight, by hand")

build = functools.partial(build_term, "mgd")


def as_identity(term):
    """Let the generation blocks hand on what is positive."""
    with torch.no_grad():
        for module in term.generation.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.zero_()
                module.bias.zero_()
                for channel in range(len(module.weight)):
                    module.weight[channel, channel, 1, 1] = 1
    return term


def test_sum_over_channels_and_cells_by_hand():
    # Nothing masked: (2 - 0)^2 + (3 - 1)^2 on p2, 1^2 on p3; over two images.
    student = maps(p2=[(0, 0, 1, 2), (1, 1, 3, 3)], p3=[(1, 0, 0, 1)])
    teacher = maps(p2=[(1, 1, 3, 1)])
    student, teacher = ({n: x.repeat(2, 1, 1, 1) for n, x in m.items()} for m in (student, teacher))
    for x in (student, teacher):
        x["p2"][1] = x["p3"][1] = 0
    term = as_identity(build(MASK_RATIO=0.0))
    assert term(passed(student), passed(teacher), NOTHING).item() == pytest.approx(9 / 2)
    # The ReLU between the convolutions: of -3 nothing is left, (0 - 1)^2 instead of (3 - 1)^2.
    student["p2"][0, 1, 1, 3] = -3
    assert term(passed(student), passed(teacher), NOTHING).item() == pytest.approx(6 / 2)


def test_masks_leave_out_cells_of_all_channels():
    term = as_identity(build(MASK_RATIO=0.45))
    student = {"p2": torch.ones(2, 2, 64, 96), "p3": torch.zeros(2, 2, 8, 8)}
    generated = []
    term.generation["p2"].register_forward_hook(lambda m, i, output: generated.append(output))
    teacher = {n: torch.zeros_like(x) for n, x in student.items()}
    loss = term(passed(student), passed(teacher), NOTHING).item()
    first, second = generated[0][0]
    assert torch.equal(first, second)
    assert not torch.equal(generated[0][0], generated[0][1])  # images are masked apart
    kept = generated[0][:, 0].mean().item()
    assert set(generated[0].unique().tolist()) == {0, 1}
    assert kept == pytest.approx(0.55, abs=0.02)  # four deviations of 12288 draws
    assert loss == pytest.approx(kept * 2 * 64 * 96, rel=1e-5)
    term(passed(student), passed(teacher), NOTHING)
    assert not torch.equal(generated[0], generated[1])


def masks(term, number):
    """The masks of p2 in as many forwards."""
    student = {"p2": torch.ones(1, 2, 8, 8), "p3": torch.ones(1, 2, 8, 8)}
    drawn = []
    hook = (
        as_identity(term)
        .generation["p2"]
        .register_forward_hook(lambda m, i, output: drawn.append(output))
    )
    for _ in range(number):
        term(passed(student), passed(student), NOTHING)
    hook.remove()
    return torch.stack(drawn)


@rule("A term that draws random numbers has a generator of its own, saved with it")
def test_random_numbers_are_the_terms_own_and_saved_with_it(monkeypatch):
    state = torch.get_rng_state()
    term = build()
    masks(term, 2)
    saved = copy.deepcopy(term.state_dict())
    following = masks(term, 3)
    # As far as building goes, modules start from global random numbers; masks take none of them.
    after_build = torch.get_rng_state()
    assert torch.equal(masks(build(), 5)[2:], following)
    torch.set_rng_state(state)
    build()
    assert torch.equal(torch.get_rng_state(), after_build)

    resumed = build(seed=7)
    assert not torch.equal(masks(build(seed=7), 5)[2:], following)
    resumed.load_state_dict(saved)
    assert torch.equal(masks(resumed, 3), following)

    # Another process draws others, from the same state.
    monkeypatch.setattr("hkd_d2.distillation.mgd.comm.get_rank", lambda: 1)
    other = build(seed=7)
    other.load_state_dict(saved)
    assert not torch.equal(masks(other, 3), following)
    assert torch.equal(other.get_extra_state(), resumed.get_extra_state())


def test_gradients_reach_the_student_and_every_parameter():
    term = build(teacher=spec(channels=3), MASK_RATIO=0.3)
    g = torch.Generator().manual_seed(0)
    student = {n: torch.randn(1, 2, *s, generator=g).requires_grad_() for n, s in SIZES.items()}
    teacher = {n: torch.randn(1, 3, *s, generator=g).requires_grad_() for n, s in SIZES.items()}
    loss = term(passed(student), passed(teacher), NOTHING)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student["p2"].grad.any()
    assert (student["p2"].grad == 0).all(1).any()  # a masked cell
    assert all(x.grad is None for x in teacher.values())
    assert all(p.grad.any() for p in [*term.adapters["p2"].parameters()])
    assert all(p.grad is not None for p in term.parameters())


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_wrong_ratio(ratio):
    with pytest.raises(ValueError, match=f"HKD.MGD.MASK_RATIO is {ratio}; give a share"):
        build(MASK_RATIO=ratio)
