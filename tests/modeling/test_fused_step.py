"""The step by compiled kernels and by the operators' definitions, from the same weights."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from helpers.rules import rule
from helpers.small_detectors import make_batch
from hkd_d2.ops import _library

pytestmark = rule(
    "Fused and reference operators give one run: fifty steps agree to 1e-5, gradients to 1e-4"
)


@pytest.mark.long
@pytest.mark.parametrize("mask, boxes", [("none", "sampled"), ("split", "gt")])
def test_fifty_steps_agree_with_the_definitions(hkd_cfg, build, monkeypatch, mask, boxes):
    """Losses to 1e-5, the gradient of every parameter to 1e-4 of its norm, at each step."""
    compiled, by_kernel = _library.use_fused, set()

    def spy(impl, operator, device):
        fused = compiled(impl, operator, device)
        if fused:
            by_kernel.add(operator)
        return fused

    def step(model, batch, random_state, use_fused):
        monkeypatch.setattr(_library, "use_fused", use_fused)
        torch.set_rng_state(random_state)
        losses = model(batch)
        model.zero_grad()
        sum(losses.values()).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        return {n: loss.detach() for n, loss in losses.items()}, grads

    hkd_cfg.HKD.PYRAMID.MASK, hkd_cfg.HKD.REGION.BOXES = mask, boxes
    model = build(hkd_cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1)
    first = None
    with EventStorage(0):
        for number in range(50):
            batch = make_batch(seed=number)
            state = torch.get_rng_state()
            expected, expected_grads = step(model, batch, state, lambda *_: False)
            losses, grads = step(model, batch, state, spy)
            for name, loss in expected.items():
                assert abs(losses[name] - loss) <= 1e-5 * abs(loss), (number, name)
            for name, grad in expected_grads.items():
                error = (grads[name] - grad).norm()
                assert error <= 1e-4 * grad.norm(), (number, name, error / grad.norm())
            optimizer.step()
            first = first or expected
    # It was a run: the losses are no longer what they were.
    assert losses["loss_hkd_pyramid"] < 0.9 * first["loss_hkd_pyramid"]
    used = {
        "bounded_regression_loss",
        "feature_imitation_loss",
        "kl_distillation_loss",
        "multilevel_roi_align",
        "soft_cross_entropy_loss",
    }
    assert by_kernel == (used | {"roi_distillation_loss"} if boxes == "gt" else used)
