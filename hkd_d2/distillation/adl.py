"""Adaptive distillation loss: the dense classifiers of both networks, anchor by anchor."""

import torch
from detectron2.config import CfgNode

from hkd_d2.distillation.checks import one_of
from hkd_d2.distillation.spec import DetectorSpec, check_same_anchors, class_columns
from hkd_d2.distillation.term import DENSE, FEATURES, TERM_REGISTRY, Term
from hkd_d2.ops import adaptive_distillation_loss

OUTERS = ("bce", "kl")


@TERM_REGISTRY.register()
class ADL(Term):
    """Adaptive distillation of dense class probabilities (SAD, arXiv 1901.00366).

    The classes of a one-stage detector, or the objectness of a two-stage detector's RPN, at every
    anchor that is labelled object or background: the sum of the loss of
    :func:`hkd_d2.ops.adaptive_distillation_loss` over anchors and classes, divided by the sum of
    the teacher's probabilities to the power ``THETA``, a soft count of the teacher's objects that
    does not depend on the number of anchors. ``OUTER: bce`` with the defaults is the released code
    (Tangshitao/Semi-supervised-Adaptive-Distillation), ``OUTER: kl`` the form of the paper.

    Raises:
        ValueError: an option that is not on the list, or dense heads of different
            anchors or classes.
    """

    needs = frozenset({FEATURES, DENSE})

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term.
        node.WEIGHT = 1.0
        # Exponent of the focus on what the student gets wrong and what is hard.
        node.GAMMA = 2.0
        # Balance of the two halves of the cross-entropy where OUTER is bce.
        node.ALPHA = 0.5
        # Share of the teacher's entropy that is taken off the focus; the paper's beta is 1 -
        # BETA_C.
        node.BETA_C = 0.0
        # Exponent of the normaliser, the sum of the teacher's probabilities to this power.
        node.THETA = 1.8
        # What the focus weighs: bce (cross-entropy, the released code) | kl (the paper's form).
        node.OUTER = "bce"

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        node = cfg.HKD.ADL
        outer = one_of("HKD.ADL.OUTER", node.OUTER, OUTERS)
        for name in ("GAMMA", "THETA"):
            if not node[name] >= 0:
                raise ValueError(f"HKD.ADL.{name} is {node[name]}; give a number of at least 0.")
        check_same_anchors("adl", student.dense, teacher.dense)
        self.columns = None
        if student.one_stage:
            self.columns = class_columns("adl", cfg.HKD.TEACHER.CLASS_MAP, student, teacher)
        self.options = {
            "gamma": node.GAMMA,
            "alpha": node.ALPHA,
            "beta_c": node.BETA_C,
            "theta": node.THETA,
            "outer": outer,
        }

    def forward(self, student, teacher, targets):
        s, t = student.dense, teacher.dense
        ignored = (torch.stack(s.labels) < 0).split([x.shape[1] for x in s.logits], 1)
        # An RPN has no class axis; give it one of length 1.
        logits = [x.unflatten(1, (-1, 1)) if x.dim() == 2 else x for x in s.logits]
        probs = []
        for x in t.logits:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = x[..., None] if self.columns is None else x[..., self.columns]
            probs.append(x.sigmoid())
        return adaptive_distillation_loss(
            logits,
            probs,
            ignore=[
                mask[..., None].expand(x.shape) for mask, x in zip(ignored, logits, strict=True)
            ],
            **self.options,
        )
