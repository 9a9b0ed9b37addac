"""The optimizer: SGD or AdamW; parameters of terms are clipped apart from the student's."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

FULL_MODEL = "full_model"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that ``cfg.HKD.SOLVER.OPTIMIZER`` names over all of ``model``.

    With ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` ``value`` or ``norm`` gradients are clipped parameter
    by parameter, as Detectron2 does; with ``full_model`` by one norm over the student's parameters
    and one over those of the distillation terms, so that a large adapter gradient does not shorten
    the student's step. A term's :meth:`~hkd_d2.distillation.Term.parameter_groups` are groups of
    their own.

    Raises:
        ValueError: an unknown optimizer.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    by_family = clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL
    if by_family:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    if cfg.HKD.SOLVER.OPTIMIZER == "sgd":
        optimizer = build_sgd(cfg, model)
    elif cfg.HKD.SOLVER.OPTIMIZER == "adamw":
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        optimizer = maybe_add_gradient_clipping(
            cfg,
            torch.optim.AdamW(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY),
        )
    else:
        raise ValueError(
            f"HKD.SOLVER.OPTIMIZER is '{cfg.HKD.SOLVER.OPTIMIZER}'; choose sgd or adamw."
        )
    for term in getattr(model, "terms", {}).values():
        for own in term.parameter_groups():
            ids = {id(p) for p in own["params"]}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.add_param_group(own)
    if by_family:
        families = parameter_families(model)

        def clip_families(*_):
            for family in families:
                nn.utils.clip_grad_norm_(family, clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(clip_families)
    return optimizer


def parameter_families(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of the detector, and those of the distillation terms where there are any."""
    terms = getattr(model, "terms", None)
    of_terms = list(terms.parameters()) if terms is not None else []
    ids = {id(p) for p in of_terms}
    detector = [p for p in model.parameters() if id(p) not in ids]
    return [family for family in (detector, of_terms) if family]
