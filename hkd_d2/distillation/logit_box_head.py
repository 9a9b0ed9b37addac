"""The parts of the logit term that compare two box heads on the student's sampled boxes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import nn

from hkd_d2.distillation.adapters import make_adapter
from hkd_d2.distillation.spec import DetectorSpec, class_columns
from hkd_d2.distillation.term import FEATURES, HIDDEN, POOLED, PREDICTIONS
from hkd_d2.ops import bounded_regression_loss, kl_distillation_loss, soft_cross_entropy_loss


@dataclass
class Rows:
    """Outputs of both box heads on R boxes; the teacher's columns are already the student's.

    Attributes:
        student_hidden, teacher_hidden: (R, D_s) and (R, D_t).
        student_logits, teacher_logits: (R, K + 1) float32, background last.
        student_deltas, teacher_deltas: (R, 4) or (R, 4 K) float32.
        classes: (R,) int64, K for the background.
        sampled: the boxes, labelled.
    """

    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    student_logits: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None
    student_deltas: torch.Tensor | None = None
    teacher_deltas: torch.Tensor | None = None
    classes: torch.Tensor | None = None
    sampled: list | None = None


class BoxHeadParts(nn.Module):
    """One method a part; see :class:`~hkd_d2.distillation.logit.Logit` for the formulas.

    Args:
        parts: of :attr:`PARTS`.

    Raises:
        ValueError: class lists or deltas that cannot be paired.
    """

    PARTS = (
        *("hidden", "predictions", "kl", "kl_foreground", "kl_background"),
        *("tckd", "nckd", "cross_entropy", "deltas", "bounded"),
    )

    def __init__(self, cfg, parts: list[str], student: DetectorSpec, teacher: DetectorSpec):
        super().__init__()
        self.parts = parts
        self.temperature = cfg.HKD.LOGIT.TEMPERATURE
        self.margin = cfg.HKD.LOGIT.BOUND_MARGIN
        self.background_weight = cfg.HKD.LOGIT.BACKGROUND_WEIGHT
        self.needs = frozenset({FEATURES, POOLED, HIDDEN})
        self.adapter = None
        if "hidden" in parts:
            self.adapter = make_adapter(
                student.hidden_channels, teacher.hidden_channels, "auto", "HKD.LOGIT"
            )
        if set(parts) != {"hidden"}:
            self.needs |= {PREDICTIONS}
            self.class_columns, self.delta_columns = teacher_columns(
                cfg.HKD.TEACHER.CLASS_MAP, student, teacher
            )
            self.num_classes = student.num_classes
            self.agnostic = student.class_agnostic_deltas
            self.delta_weights = student.delta_weights
            scale = torch.tensor(student.delta_weights) / torch.tensor(teacher.delta_weights)
            self.register_buffer("delta_scale", scale, persistent=False)

    def forward(self, student, teacher) -> dict[str, torch.Tensor]:
        """The loss of each part, of at least one sampled box."""
        rows = self.rows(student, teacher)
        return {part: getattr(self, part)(rows) for part in self.parts}

    def rows(self, student, teacher) -> Rows:
        s, t = student.regions, teacher.regions
        if PREDICTIONS not in self.needs:
            return Rows(s.hidden, t.hidden)
        deltas = t.deltas.float()[:, self.delta_columns]
        return Rows(
            student_hidden=s.hidden,
            teacher_hidden=t.hidden,
            student_logits=s.class_logits.float(),
            teacher_logits=t.class_logits.float()[:, self.class_columns],
            student_deltas=s.deltas.float(),
            teacher_deltas=(deltas.unflatten(1, (-1, 4)) * self.delta_scale).flatten(1),
            classes=torch.cat([x.gt_classes for x in student.sampled]),
            sampled=student.sampled,
        )

    def hidden(self, rows):
        ours = rows.student_hidden
        if self.adapter is not None:
            ours = self.adapter(ours)
        return F.mse_loss(ours.float(), rows.teacher_hidden.float())

    def predictions(self, rows):
        logits = F.mse_loss(rows.student_logits, rows.teacher_logits)
        return 0.5 * (logits + F.mse_loss(rows.student_deltas, rows.teacher_deltas))

    def kl(self, rows, weights=None):
        return kl_distillation_loss(
            rows.student_logits,
            rows.teacher_logits,
            temperature=self.temperature,
            weights=weights,
        )

    def kl_foreground(self, rows):
        return self.kl(rows, self.is_foreground(rows).float())

    def kl_background(self, rows):
        return self.kl(rows, (rows.classes == self.num_classes).float())

    def is_foreground(self, rows):
        return (rows.classes >= 0) & (rows.classes < self.num_classes)

    def tckd(self, rows):
        target = self.is_target(rows)
        # The logits of "the row's class" and of "any other": their softmax has these two masses.
        either = []
        for logits in (rows.student_logits, rows.teacher_logits):
            x = logits / self.temperature
            either.append(torch.stack([x[target], self.others(x, target).logsumexp(1)], 1))
        return self.temperature**2 * kl_distillation_loss(*either)

    def nckd(self, rows):
        target = self.is_target(rows)
        return kl_distillation_loss(
            self.others(rows.student_logits, target),
            self.others(rows.teacher_logits, target),
            temperature=self.temperature,
        )

    def is_target(self, rows):
        return F.one_hot(rows.classes, self.num_classes + 1).bool()

    @staticmethod
    def others(logits, target):
        """The logits of all classes but the target, (R, K)."""
        return logits[~target].view(len(logits), -1)

    def cross_entropy(self, rows):
        class_weights = rows.student_logits.new_ones(self.num_classes + 1)
        class_weights[-1] = self.background_weight
        return soft_cross_entropy_loss(
            rows.student_logits,
            rows.teacher_logits,
            temperature=self.temperature,
            class_weights=class_weights,
        )

    def deltas(self, rows):
        student, teacher, _ = self.foreground_deltas(rows)
        return F.smooth_l1_loss(student, teacher, reduction="sum") / len(rows.classes)

    def bounded(self, rows):
        student, teacher, foreground = self.foreground_deltas(rows)
        target = self.target_deltas(rows.sampled, foreground)
        return bounded_regression_loss(
            student, teacher, target, margin=self.margin, normalizer=len(rows.classes)
        )

    def foreground_deltas(self, rows):
        """Both networks' four deltas of each foreground row's class, and the rows' indices."""
        foreground = self.is_foreground(rows).nonzero().squeeze(1)
        sides = [x[foreground] for x in (rows.student_deltas, rows.teacher_deltas)]
        if not self.agnostic:
            index = torch.arange(len(foreground), device=foreground.device)
            classes = rows.classes[foreground]
            sides = [x.unflatten(1, (-1, 4))[index, classes] for x in sides]
        return *sides, foreground

    def target_deltas(self, sampled, rows):
        """Ground-truth deltas of the rows in the student's parametrisation, (len(rows), 4)."""
        if len(rows) == 0:
            return torch.zeros(0, 4, device=rows.device)
        proposals = torch.cat([x.proposal_boxes.tensor for x in sampled])[rows]
        # An image without ground truth has no gt_boxes field and no foreground row either.
        truth = torch.cat(
            [(x.gt_boxes if x.has("gt_boxes") else x.proposal_boxes).tensor for x in sampled]
        )[rows]
        return Box2BoxTransform(self.delta_weights).get_deltas(proposals, truth)


def teacher_columns(
    class_map: list[int], student: DetectorSpec, teacher: DetectorSpec
) -> tuple[list[int], list[int]]:
    """Columns of the teacher's class logits and deltas that stand for the student's.

    Args:
        class_map: for each student class the teacher's class, [] for the same list.

    Returns:
        list[int], list[int]: student.num_classes + 1 columns of logits (background last), and the
        columns of the deltas: 4, or 4 a class.

    Raises:
        ValueError: class lists of different length without a map, a map of the wrong length or out
            of range, or deltas that cannot be paired.
    """
    class_map = class_columns("logit", class_map, student, teacher)
    logits = [*class_map, teacher.num_classes]
    if student.class_agnostic_deltas and not teacher.class_agnostic_deltas:
        if student.num_classes > 1:
            raise ValueError(
                "The student's deltas are class-agnostic and the teacher's are not, so for several "
                "classes they cannot be paired; set the student's "
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG to False."
            )
        deltas = [4 * class_map[0] + k for k in range(4)]
    elif teacher.class_agnostic_deltas:
        deltas = list(range(4)) * (1 if student.class_agnostic_deltas else student.num_classes)
    else:
        deltas = [4 * c + k for c in class_map for k in range(4)]
    return logits, deltas
