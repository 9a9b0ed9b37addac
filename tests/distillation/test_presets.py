"""Presets of feature methods on small detectors: they train, and with weight 0 leave no trace."""

import pytest
import torch

from helpers.rules import rule
from helpers.small_detectors import make_batch, use_preset
from helpers.training_steps import steps
from hkd_d2.engine.solver import build_optimizer

PRESETS = ["fgfi", "defeat", "pkd", "cwd", "fgd", "mgd", "reviewkd"]


@pytest.fixture(params=PRESETS)
def preset_cfg(request, hkd_cfg):
    return use_preset(hkd_cfg, request.param)


@rule("Neutrality: with weights 0 a run equals plain Detectron2 bit for bit")
def test_weight_zero_equals_plain_detectron2_bit_for_bit(student_cfg, preset_cfg, build):
    preset_cfg.HKD.POOLER, preset_cfg.HKD.CHANNELS_LAST = "torchvision", False
    for name in preset_cfg.HKD.TERMS:
        preset_cfg.HKD[name.upper()].WEIGHT = 0.0
    batches = [make_batch(seed=s) for s in range(2)]
    plain, distilled = build(student_cfg), build(preset_cfg)
    expected, _ = steps(plain, batches)
    found, storage = steps(distilled, batches)
    for (losses, grads, state), (losses0, grads0, state0) in zip(found, expected, strict=True):
        assert all(torch.equal(losses[name], loss) for name, loss in losses0.items())
        assert all(torch.equal(grads[name], grad) for name, grad in grads0.items())
        assert torch.equal(state, state0)
    for name in preset_cfg.HKD.TERMS:
        assert storage.history(f"hkd/{name}_raw").latest() > 1e-6
    state0 = plain.state_dict()
    assert list(distilled.state_dict()) == list(state0)
    assert all(torch.equal(v, state0[k]) for k, v in distilled.state_dict().items())


@rule("A method's preset trains small detectors")
def test_three_steps_train_the_student_and_the_terms(preset_cfg, build):
    preset_cfg.HKD.GRADIENT_SHARE_PERIOD = 1
    model = build(preset_cfg)
    held = [p for group in build_optimizer(preset_cfg, model).param_groups for p in group["params"]]
    assert {id(p) for p in model.terms.parameters()} <= {id(p) for p in held}
    before = [p.detach().clone() for p in model.terms.parameters()]
    batches = [make_batch(ignore=False, seed=s) for s in range(3)]
    batches[1][0]["instances"] = batches[1][0]["instances"][:0]
    record, storage = steps(model, batches, lr=1e-4)
    assert all(torch.isfinite(loss) for losses, _, _ in record for loss in losses.values())
    for name in preset_cfg.HKD.TERMS:
        assert storage.latest()[f"hkd_gradient_share/loss_hkd_{name}"][0] > 0
    assert all(p.grad is not None for p in model.terms.parameters())
    assert not all(map(torch.equal, model.terms.parameters(), before))


@rule("Nothing to compare gives 0 with a gradient")
def test_a_batch_without_objects_gives_every_parameter_a_gradient(preset_cfg, build):
    """Distributed training waits for each."""
    model = build(preset_cfg)
    batch = make_batch()
    for record in batch:
        record["instances"] = record["instances"][:0]
    record, _ = steps(model, [batch], lr=1e-4)
    assert all(torch.isfinite(loss) for loss in record[0][0].values())
    assert all(p.grad is not None for p in model.terms.parameters())
