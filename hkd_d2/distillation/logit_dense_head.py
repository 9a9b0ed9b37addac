"""The parts of the logit term that compare dense heads: one-stage detectors, and RPNs."""

import torch
import torch.nn.functional as F
from torch import nn

from hkd_d2.distillation.spec import DetectorSpec, check_same_anchors, class_columns
from hkd_d2.distillation.term import DENSE, FEATURES
from hkd_d2.ops import bounded_regression_loss, kl_distillation_loss, soft_cross_entropy_loss


def object_deltas(student, teacher, delta_scale, transform, objects):
    """Both networks' deltas of the anchors of objects, and the ground truth's; (P, 4) each.

    Args:
        student, teacher: the student's with ``matched_boxes``.
        delta_scale: (4,) factors from the teacher's parametrisation to the student's.
        transform: the student's parametrisation.
        objects: (N, R) bool over all R anchors of N images.
    """
    ours = torch.cat(student.deltas, 1)[objects].float()
    theirs = torch.cat(teacher.deltas, 1)[objects].float() * delta_scale
    anchors = torch.cat([a.tensor for a in student.anchors]).expand(*objects.shape, 4)
    matched = torch.stack(student.matched_boxes)
    return ours, theirs, transform.get_deltas(anchors[objects], matched[objects])


class OneStageParts(nn.Module):
    """Two one-stage heads, anchor by anchor; see :class:`~hkd_d2.distillation.logit.Logit`.

    Args:
        parts: of :attr:`PARTS`.

    Raises:
        ValueError: heads, anchors or class lists that do not fit.
    """

    PARTS = ("kl", "deltas", "bounded")
    needs = frozenset({FEATURES, DENSE})

    def __init__(self, cfg, parts: list[str], student: DetectorSpec, teacher: DetectorSpec):
        super().__init__()
        check_same_anchors("logit", student.dense, teacher.dense)
        self.parts = parts
        self.temperature = cfg.HKD.LOGIT.TEMPERATURE
        self.margin = cfg.HKD.LOGIT.BOUND_MARGIN
        self.class_columns = class_columns("logit", cfg.HKD.TEACHER.CLASS_MAP, student, teacher)
        self.num_classes = student.num_classes
        self.transform = student.dense.transform
        scale = torch.tensor(student.delta_weights) / torch.tensor(teacher.delta_weights)
        self.register_buffer("delta_scale", scale, persistent=False)

    def forward(self, student, teacher) -> dict[str, torch.Tensor]:
        """The loss of each part."""
        s, t = student.dense, teacher.dense
        labels = torch.stack(s.labels)
        labelled = labels >= 0
        objects = labelled & (labels < self.num_classes)
        number = objects.sum().clamp(min=1)
        losses = {}
        if "kl" in self.parts:
            sizes = [x.shape[1] for x in s.logits]
            mean = kl_distillation_loss(
                s.logits,
                [x[..., self.class_columns] for x in t.logits],
                temperature=self.temperature,
                weights=list(labelled.float().split(sizes, 1)),
                activation="sigmoid",
            )
            # The operator's mean is over the labelled anchors.
            losses["kl"] = mean * labelled.sum() / number
        if {"deltas", "bounded"} & set(self.parts):
            ours, theirs, target = object_deltas(s, t, self.delta_scale, self.transform, objects)
            if "deltas" in self.parts:
                losses["deltas"] = F.smooth_l1_loss(ours, theirs, reduction="sum") / number
            if "bounded" in self.parts:
                losses["bounded"] = bounded_regression_loss(
                    ours, theirs, target, margin=self.margin, normalizer=number
                )
        return losses


class RPNParts(nn.Module):
    """Two RPNs on the student's minibatch of sampled anchors, as ``OneStageParts``."""

    PARTS = ("rpn_cross_entropy", "rpn_bounded")
    needs = frozenset({FEATURES, DENSE})

    def __init__(self, cfg, parts: list[str], student: DetectorSpec, teacher: DetectorSpec):
        super().__init__()
        check_same_anchors("logit", student.dense, teacher.dense)
        self.parts = parts
        self.temperature = cfg.HKD.LOGIT.TEMPERATURE
        self.margin = cfg.HKD.LOGIT.BOUND_MARGIN
        self.transform = student.dense.transform
        ours, theirs = (torch.tensor(x.dense.transform.weights) for x in (student, teacher))
        self.register_buffer("delta_scale", ours / theirs, persistent=False)
        class_weights = torch.tensor([1.0, cfg.HKD.LOGIT.BACKGROUND_WEIGHT])
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, student, teacher) -> dict[str, torch.Tensor]:
        """The loss of each part."""
        s, t = student.dense, teacher.dense
        labels = torch.stack(s.sampled_labels)
        sampled = labels >= 0
        losses = {}
        if "rpn_cross_entropy" in self.parts:
            ours, theirs = (torch.cat(x.logits, 1)[sampled].float() for x in (s, t))
            # A sigmoid is a softmax with a second logit of 0, here the background's.
            losses["rpn_cross_entropy"] = soft_cross_entropy_loss(
                F.pad(ours[:, None], (0, 1)),
                F.pad(theirs[:, None], (0, 1)),
                temperature=self.temperature,
                class_weights=self.class_weights,
            )
        if "rpn_bounded" in self.parts:
            objects = labels == 0
            losses["rpn_bounded"] = bounded_regression_loss(
                *object_deltas(s, t, self.delta_scale, self.transform, objects),
                margin=self.margin,
                normalizer=sampled.sum(),
            )
        return losses
