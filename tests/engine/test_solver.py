"""The optimizer: which parameters it holds and how their gradients are clipped."""

import pytest
import torch

from helpers.rules import rule
from hkd_d2.engine.preflight import check_optimizer
from hkd_d2.engine.solver import build_optimizer, parameter_families


def test_terms_are_clipped_apart_from_the_student(hkd_cfg, build):
    hkd_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    hkd_cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    hkd_cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 2.0
    hkd_cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0
    model = build(hkd_cfg)
    optimizer = build_optimizer(hkd_cfg, model)
    student, terms = parameter_families(model)
    assert {id(p) for p in terms} == {id(p) for p in model.terms.parameters()}
    for family, scale in ((student, 1e-4), (terms, 1e3)):
        for p in family:
            p.grad = torch.full_like(p, scale)
    norms = [torch.cat([p.grad.flatten() for p in f]).norm().item() for f in (student, terms)]
    assert norms[0] < 2 < norms[1]
    optimizer.step()
    clipped = [torch.cat([p.grad.flatten() for p in f]).norm().item() for f in (student, terms)]
    # The adapters' huge gradient is cut to 2; the student's, within the limit, is left alone.
    assert clipped == pytest.approx([norms[0], 2.0], rel=1e-4)


@pytest.mark.parametrize("name, kind", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers(hkd_cfg, build, name, kind):
    hkd_cfg.HKD.SOLVER.OPTIMIZER = name
    hkd_cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    model = build(hkd_cfg)
    optimizer = build_optimizer(hkd_cfg, model)
    assert isinstance(optimizer, kind)
    check_optimizer(model, optimizer)
    hkd_cfg.HKD.SOLVER.OPTIMIZER = "lion"
    with pytest.raises(ValueError, match="HKD.SOLVER.OPTIMIZER is 'lion'; choose sgd or adamw"):
        build_optimizer(hkd_cfg, model)


@rule("What cannot work stops the run before its first step, with one sentence")
def test_a_parameter_outside_the_optimizer_is_found(hkd_cfg, build):
    model = build(hkd_cfg)
    optimizer = build_optimizer(hkd_cfg, model.student)
    with pytest.raises(ValueError, match="'terms.pyramid.adapters.p2.weight' .* stands 0 times"):
        check_optimizer(model, optimizer)
